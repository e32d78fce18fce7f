#!/usr/bin/env python3
"""certkv bench decode and bench prefill: the figures add up. Speed is never judged."""

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

    def test_a_context_beyond_the_model_is_refused(self):
        product.certkv("bench", "decode", "--model", product.READER, "--context", 131072).expect_exit(
            2).expect_text("certkv: error: ", "pass the model's limit of 131072")


if __name__ == "__main__":
    product.main()
