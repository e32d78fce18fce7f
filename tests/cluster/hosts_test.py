#!/usr/bin/env python3
"""A job over several hosts gives the answers of one, and one that loses a host ends by name.

    hosts_test.py PROGRAM READER [TestClass...]
"""

import os
import re
import sys
import time
import unittest

from hosts import Cluster, harness, why_not

import product  # noqa: E402  (hosts.py says where it lies)

DEADLINE_S = 2
SLOW = "engine.decode=sleep:150"  # six steps of 0.15 s: time to lose something in
# Of a loaded machine, beyond deadline and linger.
GRACE_S = 10
REASON = why_not()


@unittest.skipIf(REASON, f"hosts need network namespaces: {REASON}")
class Hosts(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.temporary = harness.temporary_folder()
        cls.addClassCleanup(cls.temporary.cleanup)
        cls.folder = cls.temporary.name
        product.demo_batch(cls.folder, "reader", [512], 1)
        product.run_job(cls.folder, "one", "--deterministic", "true").expect_exit(0)
        cls.right = product.recorded(cls.folder, "one", "results.jsonl")

    def start(self, cluster, name, *more, ranks=2, slow=False):
        self.log = os.path.join(self.folder, name + ".log")
        env = {"CERTKV_FAILPOINT": SLOW, "CERTKV_FAILPOINT_LOG": self.log} if slow else {}
        job = cluster.start(product.command(product.job_arguments(
            self.folder, name, "--deterministic", "true", "--parallel.deadline_seconds", DEADLINE_S,
            "--store.deadline_seconds", DEADLINE_S, "--store.linger_seconds", 1, *more)), ranks,
            env=env)
        self.addCleanup(job.kill)
        return job

    def started(self, cluster, name, **options):
        """A job that decodes, with steps to come."""
        job = self.start(cluster, name, slow=True, **options)
        job.wait_for(lambda: os.path.exists(self.log), 60, "the first step")
        return job

    def expect_right(self, name):
        """What does not depend on the number of ranks is the same, bit for bit."""
        got = product.recorded(self.folder, name, "results.jsonl")
        self.assertEqual(self.what_counts(got), self.what_counts(self.right))

    @staticmethod
    def what_counts(lines):
        return [(line["custom_id"], line["error"], line["response"]["body"]["choices"],
                 line["response"]["body"]["usage"]) for line in lines]

    def programs(self, cluster):
        found = []
        for pid in (pid for host in cluster.hosts for pid in cluster.pids(host)):
            try:
                if os.readlink(f"/proc/{pid}/exe") == os.path.realpath(product.PROGRAM):
                    found.append(pid)
            except OSError:
                continue  # it has ended meanwhile
        return found

    def expect_programs_end(self, cluster, within_s):
        end = time.monotonic() + within_s
        while self.programs(cluster) and time.monotonic() < end:
            time.sleep(0.05)
        self.assertEqual(self.programs(cluster), [], f"still there after {within_s} s")

    def resumes(self, name):
        """On one host, from what the lost job has left."""
        product.run_job(self.folder, name, "--deterministic", "true", "--resume").expect_exit(0)
        self.expect_right(name)

    def test_two_hosts_with_a_store_each_answer_as_one_process_does(self):
        with Cluster(2) as cluster:
            job = self.start(cluster, "two").wait(60).expect_exit(0).expect_nothing_left()
            self.assertEqual(len(set(re.findall(r"store of this node: process (\d+)", job.stderr))),
                             2, job.stderr)
            self.expect_right("two")

    def test_four_ranks_on_three_hosts(self):
        with Cluster(3) as cluster:
            job = self.start(cluster, "three", ranks=4).wait(60).expect_exit(0).expect_nothing_left()
            self.assertEqual(len(re.findall(r"store of this node", job.stderr)), 3, job.stderr)
            self.expect_right("three")

    def test_a_host_that_dies_ends_the_job_by_name_and_leaves_nothing(self):
        with Cluster(2) as cluster:
            job = self.started(cluster, "dead")
            cluster.kill_host(1)
            self.expect_programs_end(cluster, DEADLINE_S + 1 + GRACE_S)
            job.wait(30)
            self.assertFalse(job.timed_out, job.stderr)
            self.assertNotEqual(job.exit_code, 0)
            job.expect_text("--resume").expect_nothing_left()
        self.resumes("dead")

    def test_hosts_that_are_cut_apart_end_by_name_and_leave_nothing(self):
        with Cluster(2) as cluster:
            job = self.started(cluster, "cut")
            cluster.cut(1)
            # Either side by itself: no word reaches the other.
            self.expect_programs_end(cluster, DEADLINE_S + 1 + GRACE_S)
            job.wait(60)
            self.assertFalse(job.timed_out, job.stderr)
            self.assertNotEqual(job.exit_code, 0)
            job.expect_text("no sign of life of rank 1", "--resume").expect_nothing_left()
        self.resumes("cut")

    def test_a_link_that_comes_back_within_the_deadline_changes_nothing(self):
        with Cluster(2) as cluster:
            job = self.started(cluster, "back")
            cluster.cut(1)
            time.sleep(0.4)
            cluster.mend(1)
            job.wait(60).expect_exit(0).expect_nothing_left()
            self.expect_right("back")

    def test_one_direction_that_is_lost_ends_the_job_by_name(self):
        with Cluster(2, wire=()) as cluster:
            job = self.started(cluster, "one way")
            cluster.tell_wire("drop 1 0")
            self.expect_programs_end(cluster, DEADLINE_S + 1 + GRACE_S)
            job.wait(60)
            self.assertFalse(job.timed_out, job.stderr)
            self.assertNotEqual(job.exit_code, 0)
            job.expect_text("no sign of life of rank", "--resume").expect_nothing_left()
        self.resumes("one way")

    def test_a_bad_wire_makes_it_slower_and_never_wrong(self):
        bad = ("--seed", 7, "--loss", 0.02, "--delay", 1, "--jitter", 3, "--duplicate", 0.05,
               "--corrupt", 0.02)
        with Cluster(2, wire=bad) as cluster:
            job = self.start(cluster, "bad wire", "--parallel.deadline_seconds", 20)
            job.wait(100).expect_exit(0).expect_nothing_left()
            self.expect_right("bad wire")
        for what in ("lost", "altered", "repeated"):
            self.assertGreater(cluster.wire_did[what], 5, cluster.wire_did)


if __name__ == "__main__":
    if REASON and len(sys.argv) > 3 and sys.argv[3] == "Hosts":
        print(f"skipped: hosts need network namespaces: {REASON}")
        sys.exit(77)
    product.main()
