#!/usr/bin/env python3
"""certkv bench decode, prefill, classes and store: the figures add up. Speed is never judged."""

import os
import tempfile
import unittest

import product

PHASES = {"projections", "append", "attention", "judge", "ladder", "balance", "communicate", "sample",
          "scrub", "record", "other"}


class Bench(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.json = os.path.join(self.folder.name, "figures.json")

    def bench(self, *arguments):
        job = product.certkv("bench", *arguments, "--model", product.READER, "--threads", 2, "--json",
                             self.json)
        job.expect_exit(0).expect_nothing_left()
        return job, product.read_json(self.json)

    def test_decode_shares_its_time_among_the_phases(self):
        job, report = self.bench("decode", "--context", "500,1000", "--tokens", 5, "--warmup", 2,
                                 "--compare", "budget,dense")
        job.expect_text("decode at 500 tokens, policy budget: 5 steps", "OpenBLAS's")
        self.assertEqual([(d["context"], d["policy"], d["steps"]) for d in report["decode"]],
                         [(500, "budget", 5), (500, "dense", 5), (1000, "budget", 5), (1000, "dense", 5)])
        for d in report["decode"]:
            self.assertEqual(set(d["share"]), PHASES)
            self.assertTrue(all(x >= 0 for x in d["share"].values()), d)
            self.assertAlmostEqual(sum(d["share"].values()), 1, places=3)
            self.assertAlmostEqual(sum(d["phase_us"].values()) / d["step_us"], 1, places=3)
            for phase in ("projections", "attention"):
                self.assertGreater(d["phase_us"][phase], 0)
            self.assertGreater(d["tokens_per_second"], 0)
            # 5 layers of 8 query heads
            self.assertEqual(sum(d["rungs"].values()), 5 * 5 * 8)
            if d["policy"] == "dense":
                self.assertEqual(d["rungs"]["3"], 5 * 5 * 8)

    def test_prefill_sets_its_operations_beside_those_of_openblas(self):
        job, report = self.bench("prefill", "--context", "600,1200")
        self.assertEqual([p["context"] for p in report["prefill"]], [600, 1200])
        self.assertEqual(report["decode"], [])
        for p in report["prefill"]:
            self.assertAlmostEqual(sum(p["phase_seconds"].values()) / p["seconds"], 1, places=3)
            for key in ("products_gflops", "attention_gflops", "sgemm_peak_gflops", "share_of_peak",
                        "peak_rss_bytes"):
                self.assertGreater(p[key], 0, key)
        peaks = [p["peak_rss_bytes"] for p in report["prefill"]]
        self.assertLessEqual(peaks[0], peaks[1])

    def test_classes_counts_what_its_head_steps_read(self):
        tokens, warmup, questions = 8, 4, 2
        job, report = self.bench("classes", "--context", "700", "--tolerance", "0.05,0", "--layout",
                                 "compact,classes", "--tokens", tokens, "--warmup", warmup,
                                 "--questions", questions)
        job.expect_text("context tolerance layout", "700 dense: 2 of 2 answers right")
        self.assertEqual(report["model"], product.READER)
        self.assertEqual(report["dense"], [{"context": 700, "right": 2, "questions": 2}])
        self.assertEqual([(c["context"], c["layout"], c["tolerance"]) for c in report["cases"]],
                         [(700, "compact", 0.05), (700, "compact", 0),
                          (700, "classes", 0.05), (700, "classes", 0)])
        # 5 layers of 8 query heads over 4 KV heads of 64
        per_step, kv_heads = 5 * 8, 5 * 4
        for c in report["cases"]:
            self.assertEqual(c["head_steps"], questions * (warmup + tokens) * per_step)
            self.assertEqual(c["certified"] + c["exact"], c["head_steps"])
            self.assertEqual(set(c["rungs"]), set("01234"))
            self.assertEqual(sum(c["rungs"].values()), questions * tokens * per_step)
            self.assertEqual((c["right"], c["questions"]), (questions, questions))
            self.assertGreaterEqual(c["promoted_per_head_step"], 0)
            self.assertTrue(0 <= c["hit_rate"] <= 1, c)
            # Keys and values of 64 elements of two bytes each
            self.assertAlmostEqual(c["bytes_read_per_token"], 256 * c["bytes_read_share"])
            self.assertEqual(set(c["classes"]), {"k8v4", "k8v8", "k12v8", "exact"})
            self.assertEqual(sum(c["classes"].values()),
                             questions * kv_heads if c["layout"] == "classes" else 0)
            # A head that ends at rung 3 has read its codes and then its originals: at most twice.
            self.assertGreater(c["bytes_read_share"], 0)
            self.assertLessEqual(c["bytes_read_share"], 1.2 if c["tolerance"] > 0 else 2)
            if c["tolerance"] == 0:  # no bound is 0
                self.assertEqual(c["exact"], c["head_steps"])
                self.assertEqual(c["rungs"]["3"], questions * tokens * per_step)
                self.assertGreaterEqual(c["bytes_read_share"], 1)
            else:
                self.assertGreater(c["certified"], 0)
        self.assertGreater(report["cases"][0]["rungs"]["0"], 0)
        self.assertEqual(report["cases"][3]["classes"]["exact"], questions * kv_heads)

    def test_store_compares_every_byte_and_gives_ratios_of_one_run(self):
        job = product.certkv("bench", "store", "--blocks", 64, "--seal-blocks", 1500, "--repeat", 2,
                             "--message-bytes", 65536, "--json", self.json)
        job.expect_exit(0).expect_nothing_left()
        report = product.read_json(self.json)
        self.assertTrue(report["consistent"])
        local, remote, seal = report["local"], report["remote"], report["seal"]
        self.assertEqual(local["bytes"], 64 * 8192)
        self.assertAlmostEqual(local["ratio"], local["gb_per_s"] / local["memcpy_gb_per_s"])
        self.assertEqual(seal["blocks"], 1500)
        self.assertAlmostEqual(seal["blocks_per_s"] * seal["seconds"], 1500)
        self.assertEqual(remote["blocks_8k"]["blocks_per_request"], 8)
        self.assertEqual(remote["blocks_4k"]["blocks_per_request"], 16)
        for kind in ("blocks_8k", "blocks_4k"):
            self.assertGreater(remote[kind]["gb_per_s"], 0)
            most = remote["ucx_perftest_gb_per_s"]
            if most is None:  # not installed: said, and no ratio made up
                job.expect_text("ucx_perftest is not installed")
                self.assertNotIn("ratio", remote[kind])
            else:
                self.assertAlmostEqual(remote[kind]["ratio"], remote[kind]["gb_per_s"] / most)

    def test_classes_refuses_what_it_cannot_measure_by_name(self):
        for arguments, message in (
                (("--layout", "compct"), "layout is 'compct': known layouts are compact"),
                (("--layout", "compact,"), "layout is 'compact,'"),
                (("--tolerance", "0.05,x"), "tolerance is '0.05,x'"),
                (("--tolerance", "-1"), "tolerance is '-1'"),
                (("--context", "12x"), "context is '12x'"),
                (("--context", "100"), "context is 100: more than the 129 decoded tokens"),
                (("--context", "131073"), "at most the model's limit of 131072"),
                (("--questions", "0"), "--questions: questions is '0'"),
                (("--tokens", "0"), "--tokens: tokens is '0'"),
                (("--warmup", "-1"), "--warmup: warmup is '-1'"),
                (("--text", "/no/text"), "/no/text: no texts there"),
                (("--parallel.tensor", "2"), "parallel.tensor and parallel.data must be 1"),
                (("--tolerence", "1"), "unknown flag '--tolerence'; the nearest known flag is "
                                       "'--tolerance'")):
            with self.subTest(arguments):
                product.certkv("bench", "classes", "--model", product.READER, "--json", self.json,
                               *arguments).expect_exit(2).expect_text("certkv: error: ", message)
                self.assertFalse(os.path.exists(self.json))

    def test_a_context_beyond_the_model_is_refused(self):
        product.certkv("bench", "decode", "--model", product.READER, "--context", 131072).expect_exit(
            2).expect_text("certkv: error: ", "pass the model's limit of 131072")


if __name__ == "__main__":
    product.main()
