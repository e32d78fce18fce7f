#!/usr/bin/env python3
"""Jobs that lose a process or are told to stop: what they say, what they leave, and how they go on."""

import os
import re
import signal
import time
import unittest

import harness
import product

SECONDS_TO_NOTICE = 15  # parallel.deadline_seconds is 5; the rest is a loaded machine's


class StoppedJobs(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.temporary = harness.temporary_folder()
        cls.folder = cls.temporary.name
        product.demo_batch(cls.folder, "reader", [1024, 1024], 3)
        cls.job("whole").wait(100).expect_exit(0)
        cls.whole = product.texts(cls.folder, "whole", "results.jsonl")
        assert len(cls.whole) == 6 and all(cls.whole.values())

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    @classmethod
    def job(cls, name, *arguments, ranks=2, input_file="batch.jsonl"):
        """Few sequences at once, so that lines are finished long before the last one is."""
        return product.start(*product.job_arguments(
            cls.folder, name, "--deterministic", "true", "--max-num-seqs", "2", *arguments,
            input_file=input_file), ranks=ranks)

    def start(self, name, **options):
        """A job with at least one finished line and others to come."""
        job = self.job(name, **options)
        self.addCleanup(job.kill)
        job.wait_for(lambda: self.finished(name) > 0, 60, "the first finished line")
        self.assertLess(self.finished(name), len(self.whole))
        return job

    def finished(self, name):
        journal = os.path.join(self.folder, name, "journal")
        count = 0
        for file in os.listdir(journal) if os.path.isdir(journal) else ():
            with open(os.path.join(journal, file), "rb") as lines:
                count += sum(b'"custom_id"' in line for line in lines.read().split(b"\n"))
        return count

    def store(self, job):
        return int(re.search(r"store of this node: process (\d+)", job.stderr).group(1))

    def ranks(self, job):
        pids = sorted(set(job.pids("certkv")) - {self.store(job)})
        self.assertEqual(len(pids), 2)
        return pids

    def ends(self, job, *codes, within_s=SECONDS_TO_NOTICE):
        begin = time.monotonic()
        job.wait(within_s + 30).expect_exit(*codes)
        self.assertLess(time.monotonic() - begin, within_s, job.stderr)
        job.expect_nothing_left()

    def goes_on(self, name):
        """--resume keeps what is finished and ends with the texts of the undisturbed job."""
        kept = self.finished(name)
        self.assertGreater(kept, 0)
        self.assertLess(kept, len(self.whole))
        job = self.job(name, "--resume").wait(100).expect_exit(0).expect_nothing_left()
        job.expect_text(f"{kept} of {len(self.whole)} lines are finished")
        self.assertEqual(product.texts(self.folder, name, "results.jsonl"), self.whole)

    def test_a_killed_store_is_named_and_the_job_can_go_on(self):
        job = self.start("store killed")
        store = self.store(job)
        job.signal(signal.SIGKILL, store)
        self.ends(job, 4)
        job.expect_text(f"store (pid {store}", "is lost", "--resume")
        self.goes_on("store killed")

    def test_a_killed_rank_is_named_and_the_job_can_go_on(self):
        job = self.start("rank killed")
        rank = self.ranks(job)[1]
        job.signal(signal.SIGKILL, rank)
        self.ends(job, 137)
        job.expect_text(f"rank 1 (process {rank}) is lost", f"rank 1 (pid {rank}) is lost",
                        "--resume")
        self.goes_on("rank killed")

    def test_a_killed_rank_0_is_named_and_the_job_can_go_on(self):
        job = self.start("rank 0 killed")
        rank = self.ranks(job)[0]
        job.signal(signal.SIGKILL, rank)
        self.ends(job, 137)
        job.expect_text(f"rank 0 (process {rank}) is lost", f"rank 0 (pid {rank}) is lost")
        self.goes_on("rank 0 killed")

    def test_a_rank_that_never_comes_to_the_start_is_named_with_its_host(self):
        command = product.command(product.job_arguments(
            self.folder, "never", "--parallel.start_seconds", "2"))
        script = os.path.join(self.folder, "start")
        with open(script, "w", encoding="utf-8") as file:
            file.write('#!/bin/sh\n[ "$OMPI_COMM_WORLD_RANK" != 1 ] || exec sleep 60\nexec "$@"\n')
        os.chmod(script, 0o755)
        job = harness.start([script, *command], ranks=4)
        self.addCleanup(job.kill)
        self.ends(job, 4)
        host = os.uname().nodename.split(".")[0]
        job.expect_text(f"start-up: rank 1 on host {host} did not come within 2 s (3 of this "
                        "host's 4 ranks are here)")
        self.assertEqual(job.stderr.count("start-up: "), 1)

    def test_a_rank_that_stands_still_is_named_by_the_other(self):
        job = self.start("rank stopped")
        job.signal(signal.SIGSTOP, self.ranks(job)[1])
        self.ends(job, 4)
        job.expect_text("no sign of life of rank 1", "parallel.deadline_seconds", "--resume")

    def test_sigusr1_to_mpirun_stops_the_job_with_4_and_it_can_go_on(self):
        job = self.start("usr1")
        job.signal(signal.SIGUSR1)
        self.ends(job, 4)
        job.expect_text("SIGUSR1: stopping", "To continue:", "mpirun -np 2 certkv run", "--resume")
        self.goes_on("usr1")

    def test_sigterm_to_mpirun_keeps_the_finished_lines_and_says_how_to_go_on(self):
        # One short line, and two of 1200 tokens that nothing ends before: when the short one is
        # finished the job still has seconds to go, however fast the machine is.
        short, *long = product.lines(self.folder, "batch.jsonl")[:3]
        for line in long:
            line["body"].update(max_tokens=1200, stop=[])
        product.write_lines(os.path.join(self.folder, "long.jsonl"), [short, *long])
        job = self.start("term", input_file="long.jsonl")
        begin = time.monotonic()
        job.signal(signal.SIGTERM)
        # mpirun, told to end, ends with 1 whatever its ranks return; they are the ones that speak.
        self.ends(job, 1)
        self.assertLess(time.monotonic() - begin, 5, "mpirun gives its ranks 1 s")
        job.expect_text("SIGTERM: stopping", "To continue:", "mpirun -np 2 certkv run", "--resume")
        self.assertEqual(self.finished("term"), 1)
        self.job("term", "--resume", input_file="long.jsonl").wait(200).expect_exit(0) \
            .expect_nothing_left().expect_text("1 of 3 lines are finished")
        texts = product.texts(self.folder, "term", "results.jsonl")
        self.assertEqual(texts[short["custom_id"]], self.whole[short["custom_id"]])
        for line in long:
            self.assertTrue(texts[line["custom_id"]].startswith(self.whole[line["custom_id"]]))

    def test_a_process_without_mpirun_ends_with_4_at_sigint_and_sigterm(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            job = self.start(f"alone {number}", ranks=0)
            job.signal(number)
            self.ends(job, 4)
            job.expect_text("To continue:\n  certkv run", "--resume")
            self.assertNotIn("mpirun", job.stderr)

    def test_a_job_that_runs_is_not_disturbed_by_another_in_its_folder(self):
        job = self.job("taken", ranks=0)
        self.addCleanup(job.kill)
        manifest = os.path.join(self.folder, "taken", "manifest.json")
        job.wait_for(lambda: os.path.exists(manifest), 30, "the manifest")
        self.job("taken", ranks=0).wait(30).expect_exit(2).expect_text("--output")
        self.ends(job, 0, within_s=60)
        self.assertEqual(product.texts(self.folder, "taken", "results.jsonl"), self.whole)

    def test_a_second_signal_ends_the_job_at_once(self):
        job = self.start("twice", ranks=0)
        job.signal(signal.SIGINT)
        try:
            time.sleep(0.15)  # signals closer together than 0.1 s count as one
            job.signal(signal.SIGINT)
        except ProcessLookupError:
            pass  # the first one has ended it meanwhile
        self.ends(job, 4, 128 + signal.SIGINT, within_s=2)


if __name__ == "__main__":
    product.main()
