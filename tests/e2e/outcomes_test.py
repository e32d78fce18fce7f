#!/usr/bin/env python3
"""The outcome of every head-step on a device beside the CPU backend's, through compare_outcomes.py; and
the demo models' answers on a GPU."""

import os
import subprocess
import sys
import unittest

import compare_outcomes
import harness
import product

COMPARE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "compare_outcomes.py")
# Two ranks on one GPU: NCCL takes each for a host of its own, and goes over sockets.
SHARE_A_GPU = ('export NCCL_HOSTID=rank-$OMPI_COMM_WORLD_RANK NCCL_NVLS_ENABLE=0 '
               'NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1; exec "$0" "$@"')
SKIPPED = 77


def differences(*folders):
    """Exit code and text of compare_outcomes.py."""
    return harness.run([sys.executable, COMPARE, *folders], timeout_s=100)


class Compared(unittest.TestCase):
    CONTEXT, QUESTIONS = 700, 2  # answers of 10 tokens
    POLICIES = "budget,naive,dense"

    @classmethod
    def setUpClass(cls):
        cls.temporary = harness.temporary_folder()
        cls.folder = cls.temporary.name
        product.demo_batch(cls.folder, "reader", [cls.CONTEXT], cls.QUESTIONS)
        cls.run_job("cpu", "--compare", cls.POLICIES)
        policies = product.read_json(cls.folder, "cpu", "summary.json")["policies"].values()
        cls.head_steps = sum(policy["head_steps"] for policy in policies)

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    @classmethod
    def path(cls, name):
        return os.path.join(cls.folder, name)

    @classmethod
    def run_job(cls, name, *arguments, shared_gpu=False, ranks=0):
        command = product.command(product.job_arguments(
            cls.folder, name, "--audit.sample", "1", *arguments))
        if shared_gpu:
            command = ["bash", "-c", SHARE_A_GPU, *command]
        job = harness.run([str(word) for word in command], ranks=ranks, timeout_s=200)
        return job.expect_exit(0).expect_nothing_left()

    def check_weights_of_8_bits(self, backend):
        """The device's kernels have the CPU's codes and scales; other weights are another model."""
        for name in ("cpu", backend):
            self.run_job(name + " int8", "--backend", name, "--quantization", "int8")
        job = differences(self.path("cpu int8"), self.path(backend + " int8")).expect_exit(0)
        self.assertIn(", 0 unexplained;", job.stdout)
        manifest = product.read_json(self.folder, backend + " int8", "manifest.json")
        self.assertEqual(manifest["identity"]["model.quantization"], "int8")
        texts = product.texts(self.folder, "cpu int8", "results.jsonl")
        self.assertEqual(len(texts), self.QUESTIONS)
        self.assertEqual(product.texts(self.folder, backend + " int8", "results.jsonl"), texts)
        plain, coded = (product.read_json(self.folder, name, "summary.json")
                        for name in ("cpu", "cpu int8"))
        self.assertNotEqual(plain["policies"]["budget"]["returned"], coded["returned"])


class EmulatedOutcomes(Compared):
    def test_the_kernels_of_a_device_differ_from_the_cpu_in_nothing_unexplained(self):
        self.run_job("emulated", "--backend", "emulated", "--compare", self.POLICIES)
        job = differences(self.path("cpu"), self.path("emulated")).expect_exit(0)
        print(job.stdout)
        self.assertIn(", 0 unexplained;", job.stdout)
        compared = int(job.stdout.splitlines()[-1].split()[0])
        self.assertGreater(compared, self.head_steps // 2)  # most answers go the same way

    def test_weights_of_8_bits_answer_as_the_cpu_does(self):
        self.check_weights_of_8_bits("emulated")

    def test_a_run_does_not_differ_from_itself_and_others_diverge(self):
        job = differences(self.path("cpu"), self.path("cpu")).expect_exit(0)
        job.expect_text(f"{self.head_steps} head-steps compared, 0 differ")
        for seed in (1, 2):
            requests = product.lines(self.folder, "batch.jsonl")
            for request in requests:
                request["body"].update(temperature=2.0, seed=seed)
            product.write_lines(self.path("batch.jsonl") + str(seed), requests)
            self.run_job(f"seed {seed}", "--policy", "dense", "--input",
                         self.path("batch.jsonl") + str(seed))
        job = differences(self.path("seed 1"), self.path("seed 2"))
        job.expect_text("the tokens differ; not compared from here on", " 2 sequences diverged")

    def test_what_cannot_be_compared_is_refused_by_name(self):
        self.run_job("other", "--policy", "naive")
        differences(self.path("cpu"), self.path("other")).expect_exit(2).expect_text("differ in")
        differences(self.path("cpu"), self.folder).expect_exit(2).expect_text("--audit.sample 1")


class Classes(unittest.TestCase):
    """What explains a difference, and what does not."""

    @staticmethod
    def of(policy, a, b, originals=False):
        def step(outcome, rung, bound, candidate):
            return compare_outcomes.HeadStep(outcome, rung, bound, candidate, (0, 0), b"")
        return compare_outcomes.classify(policy, step(*a), step(*b), 0.05, 64, originals)

    def test_bounds_on_both_sides_within_rounding_straddle(self):
        below, above = ("certified", 0, 0.0495, 0.0495), ("certified", 2, 0.04, 0.0505)
        self.assertEqual(self.of("budget", below, above), "straddle")
        self.assertEqual(self.of("naive", below, ("over", 0, 0.0505, 0.0505)), "straddle")
        self.assertEqual(self.of("naive", below, ("over", 0, 0.0545, 0.0545)), "unexplained")

    def test_bounds_that_are_further_apart_need_other_originals(self):
        below, above = ("certified", 0, 0.03, 0.03), ("certified", 2, 0.04, 0.08)
        self.assertEqual(self.of("budget", below, above, True), "originals")
        self.assertEqual(self.of("budget", below, above), "unexplained")
        self.assertEqual(self.of("naive", below, ("over", 0, 0.08, 0.08)), "unexplained")

    def test_rungs_differ_where_both_had_to_climb_and_not_otherwise(self):
        dense = ("exact", 3, 1e-4, 0.08)
        self.assertEqual(self.of("budget", ("certified", 2, 0.04, 0.08), dense), "ladder order")
        within = ("certified", 0, 0.03, 0.03)
        self.assertEqual(self.of("budget", within, ("exact", 3, 1e-4, 0.031)), "unexplained")

    def test_an_exact_head_whose_rounding_is_beyond_the_tolerance_could_not_be_promoted(self):
        exact = ("exact", 3, 0.2, 1e3)
        self.assertEqual(self.of("budget", ("certified", 0, 0.03, 0.03), exact), "rounding")
        self.assertEqual(self.of("budget", ("certified", 2, 0.04, 1e3), exact), "rounding")
        self.assertEqual(self.of("budget", ("certified", 0, 0.03, 0.03), ("exact", 3, 0.2, 0.03)),
                         "unexplained")

    def test_a_broken_promise_is_never_explained(self):
        climbed = ("certified", 2, 0.04, 0.08)
        for broken in (("over", 2, 0.06, 0.08), ("failed", 3, 0.0, 0.08), ("certified", 1, 0.06, 0.08),
                       ("certified", 1, float("nan"), 0.08)):
            self.assertEqual(self.of("budget", climbed, broken, True), "unexplained", broken)
        nan = ("certified", 2, 0.04, float("nan"))
        self.assertEqual(self.of("budget", ("certified", 0, 0.03, 0.03), nan, True), "unexplained")


class GpuOutcomes(Compared):
    """The reader on a GPU: the CPU's answers, and its outcomes; one rank, and two that share the GPU."""

    def check(self, name, *arguments, **options):
        self.run_job(name, "--backend", "cuda", "--compare", self.POLICIES, *arguments, **options)
        job = differences(self.path("cpu"), self.path(name))
        print(job.stdout)
        job.expect_exit(0)
        product.certkv("verify", os.path.join(self.path(name), "audit")).expect_exit(0)
        for policy in self.POLICIES.split(","):
            file = f"results-{policy}.jsonl"
            cpu = product.texts(self.folder, "cpu", file)
            self.assertEqual(len(cpu), self.QUESTIONS)
            if policy != "naive":  # promised nothing
                self.assertEqual(product.texts(self.folder, name, file), cpu, policy)

    def test_one_rank_answers_as_the_cpu_does(self):
        self.check("one")

    def test_weights_of_8_bits_answer_as_the_cpu_does(self):
        self.check_weights_of_8_bits("cuda")

    def test_two_ranks_on_one_gpu_answer_as_the_cpu_does(self):
        self.check("two", "--parallel.tensor", "2", ranks=2, shared_gpu=True)


class GpuNeedle(unittest.TestCase):
    """Codenames that dense attention copies from the context, and budget must."""

    def test_nothing_is_lost_under_budget(self):
        with harness.temporary_folder() as folder:
            product.demo_batch(folder, "needle", [2048], 4)
            model = os.path.join(folder, "model")
            product.certkv("make-model", "needle", "--preset", "fragile", "--output",
                           model).expect_exit(0)
            product.run_job(folder, "run", "--backend", "cuda", "--compare", "budget,dense,naive",
                            model=model).expect_exit(0)
            expected = {line["custom_id"]: line["expected"]
                        for line in product.lines(folder, "answers.jsonl")}
            self.assertEqual(len(expected), 4)
            for policy in ("budget", "dense"):
                found = product.texts(folder, "run", f"results-{policy}.jsonl")
                self.assertEqual({line: text.strip() for line, text in found.items()}, expected,
                                 policy)


def gpu_answers():
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=30, check=False)
        return listed.returncode == 0 and b"GPU" in listed.stdout
    except (OSError, subprocess.TimeoutExpired):
        return False


if __name__ == "__main__":
    if any(name.startswith("Gpu") for name in sys.argv[3:]) and not gpu_answers():
        print("skipped: no NVIDIA GPU answers on this machine")
        sys.exit(SKIPPED)
    product.main()
