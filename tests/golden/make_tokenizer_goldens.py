#!/usr/bin/env python3
"""Makes tests/golden/tokenizer/ with Hugging Face's own libraries. Run by hand, never in CI.

    python3 -m venv /tmp/v && /tmp/v/bin/pip install tokenizers transformers jinja2 sentencepiece
    /tmp/v/bin/python tests/golden/make_tokenizer_goldens.py

Every tokenizer is trained here, tiny, on the text below, in the form in which its family writes
tokenizer.json. Per tokenizer NAME: NAME.json (the tokenizer) and NAME.golden.json (what it says).
A hash is FNV-1a, 64 bits, over the ids as little-endian 32-bit words.
"""
import json, os, random, sys, unicodedata
import sentencepiece
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers,
                        processors, trainers)

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tokenizer")

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
          r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

CORPUS = [
    "The quick brown fox jumps over the lazy dog; they're sure it's what we've wanted, isn't it?",
    "In the beginning there was nothing, and then there were 12345 things and 67 more of them.",
    "She said: \"I'll be there at 10:30, and you'd better be there too!\"  He didn't answer.",
    "int main(int argc, char** argv) {\n    return argc > 1 ? 0 : 1;\n}\n\n\n",
    "Der Zug nach München fährt um 8 Uhr; Äpfel, Öl und Übung kosten 3,50 €.",
    "Le garçon a mangé une pêche à l'été; où est-il allé ? Ça va très bien, merci.",
    "Быстрая коричневая лиса прыгает через ленивую собаку. Привет, мир!",
    "我们在学习如何处理文字。今天天气很好，明天也会很好。", "これはテストです。東京は大きい。",
    "안녕하세요 세계, 오늘은 좋은 날입니다.", "שלום עולם, مرحبا بالعالم, नमस्ते दुनिया, สวัสดีชาวโลก",
    "😀 😃 😄 👍🏽 👩‍👩‍👧‍👦 🇩🇪 🏳️‍🌈", "user system assistant the answer is the question of the user",
    "a\tb\t\tc   d    e     f\r\ng\r\n\r\nh", "e\u0301 n\u0303 o\u0308 a\u030a",
] * 4

TEXTS = [
    "", " ", "  ", "   ", "\n", "\n\n", "\n \n", " \n ", "\t", "\r\n", "\r\n\r\n", "\r", "a", "A", " a", "a ",
    "  a  ", "a  b", "a   b    c", "   leading", "trailing   ", "x\n\n\ny", "x \n\n y", "\u00a0a\u00a0", "a\u3000b",
    "a\u200bb", "a\u0085b", "a\u180eb", "a\u2028b\u2029c", "\ufeffa", "a\x00b", "\x00", "\x7f", "\x1b[0m",
    "it's", "IT'S", "It'S", "they're we've I'm you'll he'd can't", "THEY'RE WE'VE I'M", "'s", "''s", "'\u017f", "x'\u017fy",
    "don\u2019t", "'tis 'twas", "rock'n'roll", "'", "''", "'ll'll", "1", "12", "123", "1234", "12345678901234567890",
    "1,234,567.89", "3.14159e-10", "a1b2c3", "\u0661\u0662\u0663\u0664", "\u00bd\u00b2\u2460", "\u2167", "x\u00b2", "０１２３",
    "!!!", "?!?!", "...", "a.b.c", "a...b", "(a)[b]{c}", "==>", " == ", "!\n", "!\n\n", " !\n\n x", "#!/bin/sh\n", "\\n\\t",
    "https://example.org/a?b=c&d=e#f", "user@example.org", "C:\\x\\y", "a_b_c", "__init__", "snake_case CamelCase",
    "The quick brown fox", "the answer is the question", "hello hello  hello", "München fährt", "garçon où Ça",
    "e\u0301", "\u00e9", "e\u0301\u0323", "e\u0323\u0301", "\u1e69 s\u0323\u0307 s\u0307\u0323", "\u212b \u2126 \uf900",
    "\u1100\u1161\u11a8 \uac01", "\ufb01 \uff21", "\u0344 \u0f73", "a" + "\u0301\u0316" * 9, "Привет, мир", "我们在学习", "東京は", "안녕하세요",
    "שלום", "مرحبا", "नमस्ते", "สวัสดี", "\u0e33", "😀", "😀😃", "👍🏽", "👩‍👩‍👧‍👦", "🇩🇪", "🏳️‍🌈", "\U00010000", "\U0001f600a",
    "\U0002000b", "\U000e0041", "\U000f0000", "\U0010fffd", "\ufffd", "\ufffe", "\uffff", "\ue000", "\U0001d7d8", "\U00010450x",
    "a\u0300\u0300\u0300", "\u0300", "\u200d", "\u202e abc", "x\u00ady", "ǅ ǆ", "İ ı ſ K", "ß ẞ", "Ā Ġ Ċ ġ", "▁", "a▁b", "▁▁a", " ▁a",
    "<0x41>", "<0xE2>", "<unk>", "<s>", "</s>", "<s>a", "a<s>", "a <s> b", "<s> a", "<s></s>", "[INST] x [/INST]",
    "<|begin_of_text|>", "a<|eot_id|>b", "a <|eot_id|> b", "<|eot_id|><|eot_id|>", "<|eot_id", "|eot_id|>", "<<|eot_id|>>",
    "<|im_start|>user\nhi<|im_end|>\n", "<think>x</think>", "<thin k>", "<think", "<tool_call>", "<|endoftext|>x",
    "<|reserved_special_token_1|><|reserved_special_token_10|>",
    "foo  [L]  bar", "foo[R]   bar", " [B] ", "x[L][R]y", "  [L]  [L]  ", "[R]  [R]  z", "[B]  [B]", "a[W]b", "a [W] b", "[W]", "[W][W]", "_[W]", "é[W]",
    "[W]é", "-[W]-", "[W]\u0301", "[N]", "a[N]b", "caf\u00e9tok", "cafe\u0301tok", "[W] [L]x", "ab abc abcd", "abcde",
    "\u3000[L]\u3000", "\u00a0[B]\n\n",
]
TEXTS += ["\n".join(CORPUS[:15])]

BROKEN = [b"\xff", b"\x80", b"a\xffb", b"\xc3", b"\xc3(", b"\xe2\x82", b"\xe2\x82a", b"\xf0\x9f\x98", b"\xf0\x9f\x98 x",
          b"\xc0\x80", b"\xc1\xbf", b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80",
          b"\xf8\x88\x80\x80\x80", b"\xe2\x28\xa1", b"\xf0\x28\x8c\xbc", b"\xf0\x90\x28\xbc", b"ok \xe6\x97 ok", b"\xc3\xa9\xc3", b"\xff\xfe\x00",
          b"\xf0\x80\x80\x80", b"\xf0\x8f\xbf\xbf", b"\xe0\xa0", b"\xe0\x9f\x80", b"\xf1\x80\x80\xff", b"a\xe2\x82\xe2\x82\xacb"]

LONG = [["a", 20000], [" ", 20000], ["\n", 20000], ["ab", 10000], ["7", 20000], ["!", 20000], [" the", 5000], ["  x", 5000],
        ["é", 10000], ["😀", 4000], ["\r\n", 8000], ["the quick ", 3000], ["e\u0301", 6000], ["<|eot_id|>", 500], ["a\u0301\u0316", 4000]]


def fnv(ids):
    h = 0xCBF29CE484222325
    for i in ids:
        for b in int(i).to_bytes(4, "little"):
            h = ((h ^ b) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{h:016x}"


def assigned_ranges():
    """Code points that Unicode 14 assigns, without surrogates and private use."""
    assert unicodedata.unidata_version == "14.0.0", "run with Python 3.11"
    out = []
    for c in range(0x110000):
        if unicodedata.category(chr(c)) in ("Cn", "Cs", "Co"):
            continue
        if out and out[-1][1] == c - 1:
            out[-1][1] = c
        else:
            out.append([c, c])
    return out


def plane_text(points):
    return "".join(f"x{chr(c)}{chr(c)} {chr(c)}1{chr(c)}'s\n" for c in points)


RANGES = assigned_ranges()
POINTS = [c for a, b in RANGES for c in range(a, b + 1)]
CHUNK = 1024


def random_texts(count, seed):
    r = random.Random(seed)
    atoms = [" ", "  ", "\n", "\r\n", "\t", "'s", "'re", "1", "42", "2024", "the", "The", "é", "e\u0301", "ü", "日本", "😀", "👍🏽",
             "!", "...", "?", ",", "_", "-", "(", "\u00a0", "\u3000", "\u200d", "\u0301", "<s>", "</s>", "<|eot_id|>", "<think>", "a", "b", "▁",
             "\u1161", "\u1100", "Ġ", "\x00", "\ufffd", "\u180e", "x", "qu", "ick", "[L]", "[R]", "[W]", "ſ"]
    return ["".join(r.choice(atoms) for _ in range(r.randint(2, 24))) for _ in range(count)]


def golden(name, tok, planes=True):
    def ids(text, special):
        return tok.encode(text, add_special_tokens=special).ids

    cases = []
    for t in TEXTS + random_texts(120, name):
        tok.encode_special_tokens = True
        as_text = ids(t, False)
        tok.encode_special_tokens = False
        plain, full = ids(t, False), ids(t, True)
        prefix = len(full) - len(plain)
        case = {"text": t, "ids": plain, "around": full if prefix and t in ("", "a") else None,
                "as_text": as_text if as_text != plain else None}
        kept, skipped = tok.decode(full, skip_special_tokens=False), tok.decode(full, skip_special_tokens=True)
        if "tok" in t and name == "added":
            # Decoding an added token that normalising changes: Hugging Face takes the letters of its
            # normalised content for bytes and garbles them; we return the content.
            case["encode_only"] = True
        else:
            if kept != t:
                case["kept"] = kept
            if skipped != kept:
                case["skipped"] = skipped
        cases.append({k: v for k, v in case.items() if v is not None})
    broken = [[b.hex(), ids(b.decode("utf-8", "replace"), False)] for b in BROKEN]
    long = [[u, n, fnv(ids(u * n, False)), len(ids(u * n, False))] for u, n in LONG]
    r = random.Random(name + "ids")
    size = max(tok.get_vocab().values()) + 1
    decoded = []
    for _ in range(150):
        # Mostly small ids, which are the bytes: invalid and cut sequences come up often.
        some = [r.randrange(min(size, 300)) if r.random() < 0.8 else r.randrange(size) for _ in range(r.randint(1, 12))]
        decoded.append([some, tok.decode(some, skip_special_tokens=False), tok.decode(some, skip_special_tokens=True)])
    out = {"vocab_size": size, "cases": cases, "broken": broken, "long": long, "decoded": decoded}
    if planes:
        out["planes"] = [fnv(ids(plane_text(POINTS[i:i + CHUNK]), False)) for i in range(0, len(POINTS), CHUNK)]
    write(f"{name}.golden.json", out)


def write(file, value):
    with open(os.path.join(HERE, file), "w", encoding="utf-8", newline="\n") as f:
        json.dump(value, f, ensure_ascii=False, separators=(",", ":"))
        f.write("\n")


def save(name, tok):
    spec = json.loads(tok.to_str())
    write(f"{name}.json", spec)
    return Tokenizer.from_str(json.dumps(spec))


def train(tok, vocab, special=(), alphabet=None):
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=list(special), show_progress=False,
                                  initial_alphabet=alphabet or [])
    tok.train_from_iterator(CORPUS, trainer)


def byte_alphabet():
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def with_ignore_merges(tok):
    spec = json.loads(tok.to_str())
    spec["model"]["ignore_merges"] = True
    return Tokenizer.from_str(json.dumps(spec))


def llama3():
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3), "isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    train(tok, 700, alphabet=byte_alphabet())
    # A token that no merge makes: only ignore_merges finds it.
    spec = json.loads(tok.to_str())
    spec["model"]["vocab"]["Ġabcde"] = len(spec["model"]["vocab"])
    spec["model"]["vocab"]["abcde"] = len(spec["model"]["vocab"])
    tok = with_ignore_merges(Tokenizer.from_str(json.dumps(spec)))
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
             "<|reserved_special_token_1|>", "<|reserved_special_token_10|>"]
    tok.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    bos = tok.token_to_id(names[0])
    tok.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single=f"{names[0]} $A", pair=f"{names[0]} $A {names[0]}:1 $B:1",
                                      special_tokens=[(names[0], bos)])])
    return tok


def qwen():
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN), "isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tok.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    train(tok, 700, alphabet=byte_alphabet())
    tok.add_special_tokens([AddedToken(n, special=True, normalized=False)
                            for n in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    tok.add_tokens([AddedToken(n, special=False, normalized=False)
                    for n in ("<think>", "</think>", "<tool_call>", "</tool_call>")])
    return tok


def gpt2():
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=True)])
    tok.decoder = decoders.ByteLevel()
    train(tok, 500, special=["<|endoftext|>"], alphabet=byte_alphabet())
    end = tok.token_to_id("<|endoftext|>")
    tok.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A <|endoftext|>",
                                                       special_tokens=[("<|endoftext|>", end)])
    return tok


def added():
    """Added tokens of every kind, over GPT-2's splitting and NFC."""
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    train(tok, 400, alphabet=byte_alphabet())
    tok.add_special_tokens([AddedToken("[L]", lstrip=True, normalized=False),
                            AddedToken("[R]", rstrip=True, normalized=False),
                            AddedToken("[B]", lstrip=True, rstrip=True, normalized=False),
                            AddedToken("<|eot_id|>", normalized=False)])
    tok.add_tokens([AddedToken("[W]", single_word=True, normalized=False), AddedToken("[N]", normalized=True),
                    AddedToken("cafe\u0301tok", normalized=True), AddedToken("ab"), AddedToken("abcd")])
    return tok


def pieces():
    """A SentencePiece BPE model, and the same as tokenizer.json writes it."""
    path = os.path.join(HERE, "pieces")
    with open("/tmp/certkv_corpus.txt", "w", encoding="utf-8") as f:
        f.write("\n".join(l for t in CORPUS for l in t.splitlines() if l.strip()))
    sentencepiece.SentencePieceTrainer.train(
        input="/tmp/certkv_corpus.txt", model_prefix=path, vocab_size=700, model_type="bpe", byte_fallback=True,
        character_coverage=0.98, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, allow_whitespace_only_pieces=True, num_threads=1, minloglevel=2)
    os.remove(path + ".vocab")
    sp = sentencepiece.SentencePieceProcessor(model_file=path + ".model")
    vocab = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
    # Every cut of a piece into two pieces is a merge; the piece with the better score comes first.
    merges = []
    for piece, i in vocab.items():
        if sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i):
            continue
        for cut in range(1, len(piece)):
            if piece[:cut] in vocab and piece[cut:] in vocab:
                merges.append((-sp.get_score(i), vocab[piece[:cut]], vocab[piece[cut:]], piece[:cut], piece[cut:]))
    merges.sort()
    return sp, vocab, [(m[3], m[4]) for m in merges]


def llama2(vocab, merges):
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])
    tok.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in ("<unk>", "<s>", "</s>")])
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return tok


def metaspace(vocab, merges):
    """Without byte fallback: unknown characters, and the first word alone gets its space."""
    vocab = {k: v for k, v in vocab.items() if not k.startswith("<0x")}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=False))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    tok.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    tok.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in ("<unk>", "<s>", "</s>")])
    return tok


def unsplit(vocab, merges):
    """Newer SentencePiece conversions: Metaspace that does not split, byte fallback."""
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])
    tok.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in ("<unk>", "<s>", "</s>")])
    return tok


def splits():
    """What each kind of Split makes of a text, seen through a vocabulary without merges."""
    out = []
    texts = ["a--b-c", "--", "-", "-a", "a-", "ab--", "a1-22--b", " a - b ", ""]
    patterns = [("String", "-"), ("Regex", "-+"), ("Regex", "\\d|-"), ("Regex", "x*")]
    behaviors = ["removed", "isolated", "merged_with_previous", "merged_with_next", "contiguous"]
    for kind, pattern in patterns:
        for behavior in behaviors:
            for invert in (False, True):
                step = pre_tokenizers.Split(pattern if kind == "String" else Regex(pattern), behavior, invert)
                out.append({"spec": json.loads(step.__getstate__()),
                            "words": [[t, [w for w, _ in step.pre_tokenize_str(t)]] for t in texts]})
    return out


PLAIN = "{% for m in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}{{ m.content }}{% endfor %}"
LLAMA3_CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content|trim"
    " + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}")
LLAMA31_CHAT = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content|trim %}{% set rest = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n'"
    " + s + '<|eot_id|>' }}{% for m in rest %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content|trim"
    " + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}")


def chatml(system):
    default = ("{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\n" + system + "<|im_end|>\\n' }}{% endif %}"
               if system else "")
    return (default + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


QWEN3_CHAT = (
    "{% set ns = namespace(seek=true, q=messages|length - 1) %}{% for m in messages[::-1] %}"
    "{% if ns.seek and m.role == 'user' and not (m.content.startswith('<tool_response>') and"
    " m.content.endswith('</tool_response>')) %}{% set ns.seek = false %}{% set ns.q = messages|length - 1 - loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set c = m.content %}{% set r = '' %}"
    "{% if m.role == 'assistant' and '</think>' in c %}"
    "{% set r = c.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.q and (loop.last or r) %}"
    "{{ '<think>\\n' + r.strip('\\n') + '\\n</think>\\n\\n' + c.lstrip('\\n') }}{% else %}{{ c }}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def chats():
    from transformers import PreTrainedTokenizerFast
    S, U, A = (lambda c, r=r: {"role": r, "content": c} for r in ("system", "user", "assistant"))
    talks = [
        [U("Hello")], [S("Be brief."), U("Hello")], [U("Hi"), A("Hello!"), U("How are you?")],
        [S("  spaces \n"), U("\n\n lines \n\n"), A("\t tab\t"), U("\u3000wide\u00a0\x1c")], [U("")], [S(""), U("x")], [U("a"), A("b")],
        [U("é e\u0301 日本 😀"), A(""), U("1234'S")], [S("s"), U("u"), S("late system"), U("v")], [A("assistant first"), U("x")],
        [U("q"), A("<think>\nhmm\n</think>\n\nanswer"), U("again")], [U("q"), A("<think>\nhmm\n</think>\n\nanswer")],
        [U("q"), A("<think>a</think>mid</think>\n\nlast"), A("<think>\n\n</think>\n\nx"), A("plain")],
        [U("<tool_response>\nr\n</tool_response>"), A("done"), U("<tool_response>\nr\n</tool_response>")],
        [A("only assistant")], [S("only system")],
    ]
    out = []
    for style, name, text in [
            ("plain", "llama3", PLAIN), ("llama3", "llama3", LLAMA3_CHAT), ("llama31", "llama3", LLAMA31_CHAT),
            ("qwen2", "qwen", chatml("You are a helpful assistant.")),
            ("qwen25", "qwen", chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")),
            ("chatml", "qwen", chatml("")), ("qwen3", "qwen", QWEN3_CHAT)]:
        tok = PreTrainedTokenizerFast(tokenizer_file=os.path.join(HERE, f"{name}.json"), bos_token="<|begin_of_text|>"
                                      if name == "llama3" else None, chat_template=text)
        raw = Tokenizer.from_file(os.path.join(HERE, f"{name}.json"))
        prompts = []
        for talk in talks:
            rendered = tok.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
            ids = raw.encode(rendered, add_special_tokens=style == "plain").ids
            prompts.append({"messages": talk, "text": rendered, "ids": ids})
        out.append({"style": style, "tokenizer": name, "template": text, "prompts": prompts})
    write("chats.golden.json", out)


def main():
    os.makedirs(HERE, exist_ok=True)
    write("ranges.json", {"chunk": CHUNK, "ranges": RANGES})
    for name, tok in (("llama3", llama3()), ("qwen", qwen()), ("gpt2", gpt2())):
        golden(name, save(name, tok))
    golden("added", save("added", added()), planes=False)
    sp, vocab, merges = pieces()
    for name, make in (("llama2", llama2), ("unsplit", unsplit)):
        golden(name, save(name, make(vocab, merges)), planes=False)
    small = {k: i for i, k in enumerate(k for k in vocab if not k.startswith("<0x"))}
    golden("metaspace", save("metaspace", metaspace(small, merges)), planes=False)
    reader = Tokenizer.from_file(os.path.join(HERE, "reader.json"))
    golden("reader", reader, planes=False)
    texts = [t for t in TEXTS if "<s>" not in t and "</s>" not in t and "<unk>" not in t and "\x00" not in t]
    write("pieces.golden.json", {"cases": [[t, sp.encode(t)] for t in texts]})
    write("splits.golden.json", splits())
    chats()


if __name__ == "__main__":
    sys.exit(main())
