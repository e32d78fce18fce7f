#!/usr/bin/env python3
"""Makes tests/golden/models: tiny random models of every supported architecture, and what Hugging
Face transformers says they answer. Run by hand (never by the tests):

    python3 -m venv venv && venv/bin/pip install torch transformers numpy
    venv/bin/python tests/golden/make_model_goldens.py [tests/golden/models]

Written with torch 2.15.0 and transformers 5.23.0. Weights are drawn in float32 and rounded to the
model's own type; the forward pass runs in float32, except that keys (after RoPE) and values are
rounded to the model's type, as the engine keeps them. This is done by an attention function of our
own, registered with transformers; everything else is theirs.

golden.json per model:
  prompt_ids     the prompt
  logits         of the prompt's last token [vocab]
  greedy_ids     the greedy continuation
  margins        largest minus second largest logit at each of its steps
  final_logits   of the step after the last greedy id [vocab]
  spread         largest difference of any of these logits between this pass and four passes in
                 float64 whose RoPE frequencies are off by 1 and 3 halves of a float32's last place:
                 what float32 rounding does to this model (directly, and by keys and values that
                 round the other way), from which the test derives its tolerance
"""
import json
import pathlib
import sys

import torch
import transformers
from safetensors.torch import save_file
from transformers import AttentionInterface, AttentionMaskInterface

GREEDY = 16


def rounded_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    kind = getattr(torch, module.config.certkv_originals)
    key, value = key.to(kind).to(query.dtype), value.to(kind).to(query.dtype)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    n = query.shape[2]
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("certkv_rounded", rounded_attention)
AttentionMaskInterface.register("certkv_rounded", lambda *args, **kwargs: None)

BASE = dict(hidden_size=32, intermediate_size=44, num_hidden_layers=2, vocab_size=112,
            rms_norm_eps=1e-5, max_position_embeddings=4096, hidden_act="silu",
            tie_word_embeddings=False, rope_theta=10000.0, bos_token_id=0, eos_token_id=1)


def model(architecture, dtype, heads, kv_heads, head_dim, prompt, **more):
    kinds = dict(LlamaForCausalLM="llama", MistralForCausalLM="mistral", Qwen2ForCausalLM="qwen2",
                 Qwen3ForCausalLM="qwen3")
    return dict(BASE, architectures=[architecture], model_type=kinds[architecture],
                torch_dtype=dtype, num_attention_heads=heads, num_key_value_heads=kv_heads,
                head_dim=head_dim, **more), prompt


# Original lengths are far below the prompts', so that scaled angles matter.
MODELS = {
    "llama2": model("LlamaForCausalLM", "float16", 2, 2, 64, 150),
    "llama3": model("LlamaForCausalLM", "bfloat16", 4, 2, 64, 180, rope_theta=500000.0,
                    tie_word_embeddings=True,
                    rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                                      high_freq_factor=4.0, original_max_position_embeddings=48)),
    "llama-linear": model("LlamaForCausalLM", "bfloat16", 2, 1, 96, 120,
                          rope_scaling=dict(type="linear", factor=4.0)),
    "llama-yarn": model("LlamaForCausalLM", "float16", 2, 1, 128, 140,
                        rope_scaling=dict(rope_type="yarn", factor=8.0, beta_fast=4.0,
                                          original_max_position_embeddings=64)),
    "mistral": model("MistralForCausalLM", "bfloat16", 4, 2, 64, 130, rope_theta=1e6,
                     sliding_window=None),
    "qwen2": model("Qwen2ForCausalLM", "bfloat16", 4, 2, 64, 110, rope_theta=1e6,
                   tie_word_embeddings=True, rms_norm_eps=1e-6),
    "qwen2-yarn": model("Qwen2ForCausalLM", "float16", 2, 2, 64, 100, rope_theta=1e6,
                        rope_scaling=dict(type="yarn", factor=4.0, attention_factor=1.3,
                                          original_max_position_embeddings=32)),
    # Long enough for two chunks of a prefill.
    "qwen3": model("Qwen3ForCausalLM", "bfloat16", 4, 2, 64, 700, rope_theta=1e6,
                   attention_bias=False),
}


def draw_weights(net, dtype, seed):
    """Large enough for attention to be selective and for every term to matter."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, w in sorted(net.named_parameters()):
            x = torch.randn(w.shape, generator=g)
            if name.endswith("norm.weight"):
                x = 1 + 0.2 * x
            elif name.endswith(".bias"):
                x = 0.5 * x
            elif "embed_tokens" not in name:
                x = 1.5 * x / w.shape[1] ** 0.5
            w.copy_(x.to(dtype).float())


class ShiftedRotary(torch.nn.Module):
    """The model's own rotary embedding with float64 angles of slightly different frequencies."""

    def __init__(self, own, shift):
        super().__init__()
        self.frequency = own.inv_freq.double() * (1 + shift * 2.0**-24)
        self.scale = own.attention_scaling

    def forward(self, x, position_ids):
        angles = position_ids[..., None].double() * self.frequency
        angles = torch.cat((angles, angles), -1)
        return angles.cos() * self.scale, angles.sin() * self.scale


@torch.no_grad()
def last_logits(net, ids):
    # No cache: every step is a whole prefill, so that nothing but the attention above rounds.
    return net(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


def run(net, prompt):
    ids, margins = list(prompt), []
    first = final = last_logits(net, ids)
    for _ in range(GREEDY):
        top = final.topk(2).values
        margins.append(float(top[0] - top[1]))
        ids.append(int(final.argmax()))
        final = last_logits(net, ids)
    return first, final, ids[len(prompt):], margins


def make(folder, name, config, length, seed):
    dtype = getattr(torch, config["torch_dtype"])
    hf = transformers.AutoConfig.for_model(**json.loads(json.dumps(config)))
    hf.certkv_originals = config["torch_dtype"]
    hf._attn_implementation = "certkv_rounded"
    net = transformers.AutoModelForCausalLM.from_config(hf, attn_implementation="certkv_rounded")
    net = net.float().eval()
    draw_weights(net, dtype, seed)
    prompt = torch.randint(2, config["vocab_size"], (length,),
                           generator=torch.Generator().manual_seed(seed + 1)).tolist()
    first, final, ids, margins = run(net, prompt)
    spread, own = 0.0, net.model.rotary_emb
    for shift in (-3, -1, 1, 3):
        exact = net.double()
        exact.model.rotary_emb = ShiftedRotary(own, shift)
        for text, logits in ((prompt, first), (prompt + ids, final)):
            spread = max(spread, float((last_logits(exact, text) - logits).abs().max()))

    to = folder / name
    to.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.to(dtype).contiguous() for k, v in net.state_dict().items()
               if not (config["tie_word_embeddings"] and k == "lm_head.weight")}
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    golden = dict(prompt_ids=prompt, logits=[float(f"{x:.7g}") for x in first.tolist()],
                  greedy_ids=ids, margins=[float(f"{x:.7g}") for x in margins],
                  final_logits=[float(f"{x:.7g}") for x in final.tolist()],
                  spread=float(f"{spread:.3g}"))
    (to / "golden.json").write_text(json.dumps(golden) + "\n")
    print(f"{name}: spread {spread:.2e}, largest logit {float(first.abs().max()):.2f}, "
          f"smallest margin {min(margins):.3f}, ids {ids}")


def main():
    torch.set_num_threads(1)
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent / "models")
    for i, (name, (config, length)) in enumerate(MODELS.items()):
        make(folder, name, config, length, 1000 + 10 * i)


if __name__ == "__main__":
    main()
