#!/usr/bin/env python3
"""What a new user does wrong, or meets: the exit code, and a message that says what to do."""

import json
import os
import shutil
import struct
import subprocess
import unittest

import harness
import product


class Errors(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.temporary = harness.temporary_folder()
        cls.folder = cls.temporary.name
        product.write_lines(cls.path("batch.jsonl"),
                            [{"prompt": "The sky is blue. " * 12 + "The sky is", "max_tokens": 4}] * 4)

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    @classmethod
    def path(cls, *parts):
        return os.path.join(cls.folder, *parts)

    def run_job(self, name, *arguments, **options):
        return product.run_job(self.folder, name, *arguments, **options)

    def refused(self, job, *texts, code=2):
        job.expect_exit(code).expect_text("certkv: error: ", *texts).expect_nothing_left()

    def test_a_missing_input_is_named(self):
        job = self.run_job("missing input", input_file="nowhere.jsonl")
        self.refused(job, "run.input is", "nowhere.jsonl", "no such file")
        self.assertFalse(os.path.exists(self.path("missing input")))

    def test_an_unknown_flag_names_the_nearest_one(self):
        self.refused(self.run_job("flag", "--polcy", "budget"),
                     "unknown flag '--polcy'", "nearest known flag is '--policy'")

    def test_an_unknown_key_names_file_line_and_the_nearest_one(self):
        with open(self.path("job.yaml"), "w", encoding="utf-8") as file:
            file.write("run:\n  max_batch: 4\npolcy: budget\n")
        self.refused(self.run_job("key", "--config", self.path("job.yaml")),
                     "job.yaml:3:1: unknown key 'polcy'", "nearest known key is 'policy'")

    def test_a_tolerance_that_is_nan_or_negative_is_refused(self):
        for value in ("nan", "-1", "inf"):
            self.refused(self.run_job("tolerance", "--tolerance-relative", value),
                         "tolerance.relative", "allowed: a number from 0")

    def test_a_limit_above_the_models_own_is_refused(self):
        self.refused(self.run_job("limit", "--max-model-len", "100000000"),
                     "model.max_len is 100000000", "own limit is 131072")

    def test_ranks_that_do_not_divide_the_heads_are_refused_with_those_that_do(self):
        self.refused(self.run_job("three", ranks=3),
                     "does not divide the model's 4 KV heads", "1, 2, 4")

    def test_an_unsupported_architecture_lists_what_is_supported(self):
        model = self.path("neox")
        shutil.copytree(product.READER, model)
        config = product.read_json(model, "config.json")
        config.update(architectures=["GPTNeoXForCausalLM"], model_type="gpt_neox")
        with open(os.path.join(model, "config.json"), "w", encoding="utf-8") as file:
            json.dump(config, file)
        self.refused(self.run_job("unsupported", model=model),
                     "GPTNeoXForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM")

    def test_a_model_that_memory_cannot_hold_is_refused_before_it_is_read(self):
        model = self.path("big")
        write_big_model(model)
        for attempt in range(2):  # the first failure is not in the way of the next try
            job = self.run_job("big", model=model)
            self.refused(job, f"model.path is '{model}'", "of host memory", "is available",
                         "smaller model")

    def test_an_arena_that_memory_cannot_hold_is_refused_once_by_the_whole_job(self):
        for ranks in (0, 2):
            job = self.run_job("huge arena", "--store.arena", "1000TiB", ranks=ranks)
            self.refused(job, "store.arena is '1000TiB'", "of shared memory", "Available memory",
                         "Lower store.arena")
            self.assertEqual(job.stderr.count("certkv: error"), 1, job.stderr)
        store = product.certkv("store", "--arena", "1000TiB")
        store.expect_exit(2).expect_text("of shared memory", "Lower store.arena")

    def test_an_arena_that_is_too_small_fails_its_lines_and_says_what_to_raise(self):
        job = self.run_job("arena", "--store.arena", "64KiB", ranks=2)
        job.expect_exit(3).expect_text("Raise store.arena").expect_nothing_left()
        errors = [line["error"] for line in product.lines(self.folder, "arena", "results.jsonl")]
        self.assertEqual(len(errors), 4)
        for error in errors:
            self.assertIn("store.arena", error["message"])

    def test_bad_lines_fail_alone_and_by_name(self):
        good = {"custom_id": "good", "body": {"prompt": "The sky is", "max_tokens": 4},
                "method": "POST", "url": "/v1/completions"}
        with open(self.path("odd.jsonl"), "w", encoding="utf-8") as file:
            file.write(json.dumps(good) + "\n")
            file.write('{"prompt": "x",\n')
            file.write(json.dumps({"prompt": "too long " * 200, "max_tokens": 4}) + "\n")
            file.write(json.dumps({"prompt": "x", "max_tokens": 4, "n": 2}) + "\n")
            file.write('{"prompt": "x", "max_tokens": 4, "certkv": {"tolerance": NaN}}\n')
        job = self.run_job("odd", "--max-model-len", "1000", input_file="odd.jsonl", ranks=2)
        job.expect_exit(3).expect_text("of 5 answers 4 failed").expect_nothing_left()
        results = product.lines(self.folder, "odd", "results.jsonl")
        self.assertEqual([line["custom_id"] for line in results], ["good", "2", "3", "4", "5"])
        self.assertIsNone(results[0]["error"])
        wanted = {1: ["line 2", "JSON"], 2: ["line 3", "1801 tokens", "1000", "model.max_len"],
                  3: ["line 4", "n is 2"], 4: ["line 5"]}
        for index, texts in wanted.items():
            for text in texts:
                self.assertIn(text, results[index]["error"]["message"])
        summary = product.read_json(self.folder, "odd", "summary.json")
        self.assertEqual((summary["requests_failed"], summary["exit_code"]), (4, 3))

    def test_a_full_disk_stops_the_job_with_4_and_it_can_go_on(self):
        disk = self.path("disk")
        os.makedirs(disk)
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk],
                                 capture_output=True, check=False)
        if mounted.returncode != 0:
            self.skipTest("a small disk cannot be mounted here: "
                          + mounted.stderr.decode().strip())
        try:
            with open(os.path.join(disk, "ballast"), "wb") as file:
                file.write(bytes(52 * 1024))
            job = self.run_job("disk/run", ranks=2)
            job.expect_exit(4).expect_text("No space left on device", "make room", "--resume")
            job.expect_nothing_left()
            os.remove(os.path.join(disk, "ballast"))
            self.run_job("disk/run", "--resume", ranks=2).expect_exit(0)
            answers = product.texts(self.folder, "disk/run", "results.jsonl")
            self.assertEqual(len(answers), 4)
            self.assertNotIn(None, answers.values())
        finally:
            subprocess.run(["umount", disk], check=True)

    def test_replicas_share_the_requests_and_answer_as_one_does(self):
        self.run_job("one", "--deterministic", "true").expect_exit(0)
        self.run_job("two", "--deterministic", "true", "--parallel.data", "2", "--max-num-seqs", "1",
                     ranks=2).expect_exit(0).expect_nothing_left()
        one = product.recorded(self.folder, "one", "results.jsonl")
        self.assertEqual(product.recorded(self.folder, "two", "results.jsonl"), one)
        self.assertEqual(sorted(os.listdir(self.path("two", "journal"))),
                         ["replica-0.jsonl", "replica-1.jsonl"])
        self.assertEqual({step["replica"] for step in product.lines(self.path("two"), "steps.jsonl")},
                         {0, 1})


def write_big_model(folder):
    """A Llama of 300 billion weights whose file is a hole."""
    shutil.copytree(product.READER, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    width, mlp, layers, words = 16384, 65536, 80, 258
    config = product.read_json(folder, "config.json")
    config.update(hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
                  num_attention_heads=128, num_key_value_heads=8, head_dim=128)
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file)
    shapes = {"model.embed_tokens": [words, width], "lm_head": [words, width], "model.norm": [width]}
    for layer in range(layers):
        name = f"model.layers.{layer}."
        for part, shape in {"input_layernorm": [width], "post_attention_layernorm": [width],
                            "self_attn.q_proj": [width, width], "self_attn.k_proj": [1024, width],
                            "self_attn.v_proj": [1024, width], "self_attn.o_proj": [width, width],
                            "mlp.gate_proj": [mlp, width], "mlp.up_proj": [mlp, width],
                            "mlp.down_proj": [width, mlp]}.items():
            shapes[name + part] = shape
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name + ".weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(os.path.join(folder, "model.safetensors"), "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


if __name__ == "__main__":
    product.main()
