#!/usr/bin/env python3
"""Shows that the harness sees exit codes, output, time-outs and leftovers, alone and under mpirun."""

import os
import signal
import time
import unittest

import harness


def shell(text):
    return ["sh", "-c", text]


class Harness(unittest.TestCase):
    def test_exit_code_and_output_are_captured(self):
        job = harness.run(shell("echo out; echo err >&2; exit 3"), timeout_s=20)
        self.assertEqual((job.exit_code, job.stdout, job.stderr), (3, "out\n", "err\n"))
        job.expect_exit(3).expect_text("out", "err").expect_nothing_left()
        with self.assertRaisesRegex(AssertionError, "ended with 3, expected 0"):
            job.expect_exit(0)
        with self.assertRaisesRegex(AssertionError, "did not say 'more'"):
            job.expect_text("more")

    def test_every_rank_runs_and_the_exit_code_comes_through_mpirun(self):
        job = harness.run(shell('echo "rank $OMPI_COMM_WORLD_RANK of $OMPI_COMM_WORLD_SIZE"'),
                          ranks=2, timeout_s=60)
        job.expect_exit(0).expect_text("rank 0 of 2", "rank 1 of 2").expect_nothing_left()
        failed = harness.run(shell("exit $((OMPI_COMM_WORLD_RANK * 7))"), ranks=2, timeout_s=60)
        failed.expect_exit(7)

    def test_a_run_past_its_time_is_ended_with_all_its_processes(self):
        started = time.monotonic()
        job = harness.run(shell("setsid sleep 300 & sleep 300"), timeout_s=0.5)
        self.assertTrue(job.timed_out)
        self.assertLess(time.monotonic() - started, 60)
        job.expect_nothing_left()
        with self.assertRaisesRegex(AssertionError, "timed out"):
            job.expect_exit(-signal.SIGKILL)

    def test_a_process_that_left_its_session_is_a_leftover(self):
        job = harness.run(shell("setsid sleep 300 >/dev/null 2>&1 & sleep 0.3"), timeout_s=20)
        job.expect_exit(0)
        processes, shm = job.leftovers(grace_s=0.1)
        self.assertEqual(([name for _, name in processes], shm), (["sleep"], []))
        with self.assertRaisesRegex(AssertionError, "left processes"):
            job.expect_nothing_left(grace_s=0.1)
        job.expect_nothing_left()  # the failed expectation has ended it

    def test_a_shared_memory_entry_is_a_leftover(self):
        name = f"certkv-harness-test-{os.getpid()}"
        job = harness.run(shell(f"echo x >{harness.SHM}/{name}"), timeout_s=20)
        try:
            self.assertIn(name, job.leftovers(grace_s=0.1)[1])
        finally:
            os.unlink(f"{harness.SHM}/{name}")
        self.assertNotIn(name, job.leftovers(grace_s=0.1)[1])

    def test_what_a_stranger_has_open_is_no_leftover(self):
        name = f"certkv-harness-stranger-{os.getpid()}"
        job = harness.start(shell("sleep 0.2"))
        with open(f"{harness.SHM}/{name}", "w", encoding="utf-8"):
            left = job.wait(20).leftovers(grace_s=0)[1]
            os.unlink(f"{harness.SHM}/{name}")
        self.assertNotIn(name, left)

    def test_a_rank_can_be_found_and_killed(self):
        job = harness.start(["sleep", "300"], ranks=2)
        try:
            job.wait_for(lambda: len(job.pids("sleep")) == 2, 60, "two ranks")
            job.signal(signal.SIGKILL, job.pids("sleep")[0])
            job.wait(60)
        finally:
            job.kill()
        self.assertFalse(job.timed_out)
        self.assertNotEqual(job.exit_code, 0)
        job.expect_nothing_left()

    def test_waiting_for_what_never_happens_fails(self):
        job = harness.start(shell("exit 0"))
        with self.assertRaisesRegex(AssertionError, "ended with 0 before the sun rose"):
            job.wait_for(lambda: False, 20, "the sun rose")
        job.wait(20).expect_exit(0)


if __name__ == "__main__":
    unittest.main()
