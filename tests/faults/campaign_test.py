#!/usr/bin/env python3
"""A short campaign, and that a campaign finds a defence that is missing.

    campaign_test.py BUILD_DIR COUNT
"""

import io
import os
import re
import signal
import sys
import tempfile
import time
import unittest
from contextlib import redirect_stdout

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import importlib.util  # noqa: E402

SPEC = importlib.util.spec_from_file_location(
    "campaign", os.path.join(os.path.dirname(os.path.abspath(__file__)), "__main__.py"))
campaign = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(campaign)
jobs = campaign.jobs


def run(*arguments):
    said = io.StringIO()
    with redirect_stdout(said):
        code = campaign.main(["--build", sys.argv[1], "--jobs", "2", *map(str, arguments)])
    return code, said.getvalue()


class Campaign(unittest.TestCase):
    def test_every_row_survives_a_few_injections(self):
        with tempfile.TemporaryDirectory() as folder:
            count = int(sys.argv[2])
            code, said = run("--count", count, "--processes", 0.1, "--seed", 5, "--output", folder)
            self.assertEqual(code, 0, said)
            whole = int(re.search(r"\| \| all \| (\d+) \|", said).group(1))
            self.assertGreater(whole, count / 2, said)
            with open(os.path.join(folder, "injections.jsonl"), encoding="utf-8") as file:
                before = file.read()
            self.assertEqual(len(before.splitlines()), count)
            # Again: everything is done, and nothing is done twice.
            code, said = run("--count", count, "--processes", 0.1, "--seed", 5, "--output", folder)
            self.assertEqual(code, 0, said)
            with open(os.path.join(folder, "injections.jsonl"), encoding="utf-8") as file:
                self.assertEqual(file.read(), before)

    def test_a_missing_digest_check_is_found(self):
        code, said = run("--count", 60, "--only", "blocks", "--also", "reader.undigested=force")
        self.assertEqual(code, 1, said)
        self.assertRegex(said, r"violation: blocks \d+:")

    def test_a_missing_check_of_tier_1_is_found(self):
        code, said = run("--count", 30, "--only", "tier1", "--also", "tier.unchecked=force")
        self.assertEqual(code, 1, said)
        self.assertRegex(said, r"violation: tier1 \d+:")


class Limits(unittest.TestCase):
    """Limits of a shell (ulimit) end a job by name, and never without an end."""

    @classmethod
    def setUpClass(cls):
        reader = os.path.join(campaign.ROOT, "launcher", "demo", "reader")
        cls.rows = campaign.process_rows.Rows(os.path.join(sys.argv[1], "bin", "certkv"), reader)
        cls.addClassCleanup(cls.rows.bench.close)

    def ends(self, *limit):
        name = "limit " + "".join(limit)
        begin = time.monotonic()
        job = self.rows.bench.start(name, wrap=("prlimit", *limit))
        return self.rows.ends(job, name, begin)

    def test_files_that_may_not_grow(self):
        for size in (0, 700, 20_000):  # the lock is empty; then the manifest, the journal, the arena
            outcome = self.ends(f"--fsize={size}")
            self.assertEqual(outcome.result, jobs.NAMED, outcome)

    def test_an_address_space_in_which_openblas_cannot_start_its_threads(self):
        for size in (274, 330):  # with less it cannot even be loaded, and waits before main()
            outcome = self.ends(f"--as={size << 20}")
            self.assertIn(outcome.result, (jobs.NAMED, jobs.SAME), outcome)


class Loading(unittest.TestCase):
    """While models are loaded, work may stand still for minutes; a process may not."""

    @classmethod
    def setUpClass(cls):
        reader = os.path.join(campaign.ROOT, "launcher", "demo", "reader")
        cls.rows = campaign.process_rows.Rows(os.path.join(sys.argv[1], "bin", "certkv"), reader)
        cls.addClassCleanup(cls.rows.bench.close)

    def job(self, name, pause_s):
        env = {"CERTKV_FAILPOINT": f"model.weights=sleep:{round(1000 * pause_s)},rank=1"}
        job = self.rows.bench.start(name, ranks=2, env=env)
        self.addCleanup(job.kill)
        return job, self.rows.store_of(job)

    def test_a_rank_that_loads_for_longer_than_the_deadline_is_waited_for(self):
        begin = time.monotonic()
        job, _ = self.job("loads long", 2.5 * jobs.DEADLINE_S)
        outcome = self.rows.ends(job, "loads long", begin, 2.5 * jobs.DEADLINE_S, 2)
        self.assertEqual(outcome.result, jobs.SAME, outcome)

    def test_a_rank_that_is_stopped_while_it_loads_is_named(self):
        job, store = self.job("stopped early", 60)
        ranks = sorted(set(job.pids("certkv")) - {store})
        self.assertEqual(len(ranks), 2)
        begin = time.monotonic()
        os.kill(ranks[1], signal.SIGSTOP)
        outcome = self.rows.ends(job, "stopped early", begin, 0, 2)
        self.assertEqual(outcome.result, jobs.NAMED, outcome)
        self.assertFalse(outcome.late, outcome)
        self.assertIn("no sign of life of rank 1", outcome.text + job.stderr)


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], *sys.argv[3:]])
