#!/usr/bin/env python3
"""The answers of certkv run: right where they must be, and the same however the work is divided."""

import os
import unittest

import harness
import product


class NeedleAnswers(unittest.TestCase):
    """Codenames that the constructed model copies from its context; its report says what dense
    attention and naive quantisation make of them."""

    # Each question costs a prefill; 8 codenames are what a document of 2048 bytes takes.
    CONTEXTS, QUESTIONS, SAMPLE = [2048, 2048, 2048], 7, 21
    NAIVE_AT_MOST = 10  # less than half of the sample

    @classmethod
    def setUpClass(cls):
        cls.temporary = harness.temporary_folder()
        cls.folder = cls.temporary.name
        product.demo_batch(cls.folder, "needle", cls.CONTEXTS, cls.QUESTIONS)
        expected = product.lines(cls.folder, "answers.jsonl")
        cls.expected = {line["custom_id"]: line["expected"] for line in expected}
        assert len(cls.expected) == cls.SAMPLE

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    def answer(self, preset):
        """Right answers by policy, and the summary, of one run that prefills each prompt once."""
        model = os.path.join(self.folder, preset)
        product.certkv("make-model", "needle", "--preset", preset, "--output", model).expect_exit(0)
        job = product.run_job(self.folder, "run " + preset, "--compare", "budget,dense,naive",
                              "--deterministic", "true", model=model, ranks=2, timeout_s=500)
        job.expect_exit(0).expect_nothing_left()
        right = {}
        for policy in ("budget", "dense", "naive"):
            texts = product.texts(self.folder, "run " + preset, f"results-{policy}.jsonl")
            self.assertEqual(texts.keys(), self.expected.keys())
            right[policy] = sum(texts[i].strip() == self.expected[i] for i in texts)
        summary = product.read_json(self.folder, "run " + preset, "summary.json")["policies"]
        for policy in ("budget", "dense"):
            self.assertEqual((summary[policy]["over"], summary[policy]["failed"]), (0, 0))
            self.assertLessEqual(summary[policy]["returned"]["relative_max"], 0.05)
        for policy, s in summary.items():
            self.assertGreater(s["head_steps"], 0, policy)
            self.assertEqual(sum(s["rungs"].values()), s["head_steps"], policy)
            self.assertEqual(s["certified"] + s["exact"] + s["over"] + s["failed"],
                             s["head_steps"], policy)
        self.assertEqual(summary["dense"]["exact"], summary["dense"]["head_steps"])
        return right, summary

    def test_the_default_preset_survives_every_policy(self):
        right, _ = self.answer("default")
        everything = self.SAMPLE
        self.assertEqual(right, {"budget": everything, "dense": everything, "naive": everything})

    def test_on_the_fragile_preset_naive_loses_more_than_half_and_budget_loses_nothing(self):
        right, summary = self.answer("fragile")
        self.assertEqual(right["dense"], self.SAMPLE)
        self.assertEqual(right["budget"], self.SAMPLE)
        self.assertLessEqual(right["naive"], self.NAIVE_AT_MOST)
        # Naive says so: its returned bounds pass the tolerance.
        self.assertGreater(summary["naive"]["over"], 0)
        self.assertGreater(summary["naive"]["returned"]["relative_max"], 0.05)


class NeedleAnswersAt8K(NeedleAnswers):
    CONTEXTS, QUESTIONS, SAMPLE = [8192], 2, 2
    NAIVE_AT_MOST = 1  # too few for a share: at least one is lost


class NeedleAnswersAt8KInFull(NeedleAnswers):
    CONTEXTS, QUESTIONS, SAMPLE = [8192], 20, 20
    NAIVE_AT_MOST = 9


class ReaderAnswers(unittest.TestCase):
    """The trained model: what is compared are runs with each other, not with the planted facts."""

    QUESTIONS = 3

    @classmethod
    def setUpClass(cls):
        cls.temporary = harness.temporary_folder()
        cls.folder = cls.temporary.name
        product.demo_batch(cls.folder, "reader", [1536], cls.QUESTIONS)

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    def run_job(self, name, *arguments, **options):
        job = product.run_job(self.folder, name, *arguments, **options)
        return job.expect_exit(0).expect_nothing_left()

    def test_deterministic_runs_are_bitwise_equal_for_every_number_of_ranks_and_threads(self):
        runs = {"one rank": (0, 1), "two threads": (0, 2), "two ranks": (2, 1), "four ranks": (4, 1)}
        for name, (ranks, threads) in runs.items():
            self.run_job(name, "--deterministic", "true", ranks=ranks, threads=threads)
        results = product.recorded(self.folder, "one rank", "results.jsonl")
        steps = product.recorded(self.folder, "one rank", "steps.jsonl")
        self.assertEqual(len(results), self.QUESTIONS)
        self.assertGreater(sum(step["promoted_keys"] for step in steps), 0)
        for name in runs:
            self.assertEqual(product.recorded(self.folder, name, "results.jsonl"), results, name)
            self.assertEqual(product.recorded(self.folder, name, "steps.jsonl"), steps, name)

    def test_weights_of_8_bits_are_bitwise_equal_for_every_number_of_ranks(self):
        for ranks in (0, 2, 4):
            self.run_job(f"int8 {ranks}", "--deterministic", "true", "--quantization", "int8",
                         ranks=ranks)
        one = product.recorded(self.folder, "int8 0", "results.jsonl")
        self.assertEqual(len(one), self.QUESTIONS)
        for ranks in (2, 4):
            self.assertEqual(product.recorded(self.folder, f"int8 {ranks}", "results.jsonl"), one)

    def test_the_answers_do_not_depend_on_the_number_of_ranks(self):
        for ranks in (0, 2, 4):
            self.run_job(f"ranks {ranks}", ranks=ranks)
        one = product.texts(self.folder, "ranks 0", "results.jsonl")
        self.assertEqual(len(one), self.QUESTIONS)
        self.assertTrue(all(one.values()), one)
        for ranks in (2, 4):
            self.assertEqual(product.texts(self.folder, f"ranks {ranks}", "results.jsonl"), one)

    def test_paper_and_naive_end_with_0_when_the_job_asks_for_them_by_name(self):
        for policy in ("paper", "naive"):
            self.run_job(policy, "--policy", policy, ranks=2)
            summary = product.read_json(self.folder, policy, "summary.json")
            self.assertEqual(summary["policy"], policy)
            self.assertGreater(summary["over"], 0)
            self.assertEqual(summary["failed"], 0)
            self.assertEqual(summary["tier1_digest"], "scrub:256")
            self.assertEqual(summary["digest_failures"], 0)

    def test_a_request_that_asks_for_naive_and_is_over_makes_the_job_end_with_3(self):
        requests = product.lines(self.folder, "batch.jsonl")[:2]
        requests[0]["body"]["certkv"] = {"policy": "naive", "tolerance": {"relative": 1e-6}}
        product.write_lines(os.path.join(self.folder, "mixed.jsonl"), requests)
        job = product.run_job(self.folder, "mixed", input_file="mixed.jsonl", ranks=2)
        job.expect_exit(3).expect_text("over").expect_nothing_left()
        extras = [line["response"]["body"]["certkv"]
                  for line in product.lines(self.folder, "mixed", "results.jsonl")]
        self.assertEqual([e["policy"] for e in extras], ["naive", "budget"])
        self.assertEqual(extras[0]["outcome"], "over")
        self.assertEqual(extras[0]["tolerance"], {"relative": 1e-6})
        self.assertGreater(extras[0]["over"], 0)
        self.assertIn(extras[1]["outcome"], ("certified", "exact"))
        self.assertEqual(extras[1]["over"], 0)


if __name__ == "__main__":
    product.main()
