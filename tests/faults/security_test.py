#!/usr/bin/env python3
"""What a job shows to others: to another user of the machine, to the network, on command lines.

    security_test.py PROGRAM READER
"""

import os
import re
import socket
import sys
import unittest

import jobs
import process_rows
from jobs import harness, product

SLOW = {"CERTKV_FAILPOINT": "engine.decode=sleep:150"}
SECRET = re.compile(r"(?i)(key|secret|token|passw)")


def inodes(pid):
    """Of the sockets that a process holds."""
    found = set()
    for fd in os.scandir(f"/proc/{pid}/fd"):
        try:
            link = os.readlink(fd.path)
        except OSError:
            continue
        if link.startswith("socket:["):
            found.add(link[8:-1])
    return found


def listening(pid):
    """[(protocol, address)] on which a process takes what comes from outside, as the kernel has it."""
    own, found = inodes(pid), []
    for protocol, state in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        try:
            with open(f"/proc/{pid}/net/{protocol}", encoding="ascii") as file:
                rows = [line.split() for line in file.readlines()[1:]]
        except OSError:
            continue
        found += [(protocol, row[1]) for row in rows if row[3] == state and row[9] in own]
    return found


def is_loopback(address):
    host = address.split(":")[0]
    return host.endswith("7F") and len(host) == 8 or host == "0" * 24 + "01000000"


class Security(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.bench = jobs.Bench(sys.argv[1], sys.argv[2])
        cls.addClassCleanup(cls.bench.close)

    def running(self, name, ranks=0):
        """(job, its store) of a job that decodes."""
        log = os.path.join(self.bench.folder, name + ".log")
        job = self.bench.start(name, ranks=ranks, env={**SLOW, "CERTKV_FAILPOINT_LOG": log})
        self.addCleanup(job.kill)
        job.wait_for(lambda: os.path.exists(log), 60, "the first step")
        return job, int(jobs.STORE.search(job.stderr).group(1))

    def ends_well(self, job, name):
        job.wait(60).expect_exit(0).expect_nothing_left()
        self.assertEqual(self.bench.judge_answers(name), (len(self.bench.answers), 0, None))

    @unittest.skipIf(os.geteuid() != 0, "only root can become another user")
    def test_another_user_gets_at_nothing(self):
        job, store = self.running("intruder")
        folder = os.path.join(self.bench.folder, "intruder")
        self.assertEqual(process_rows.intrude(job, store, folder), "")
        self.ends_well(job, "intruder")
        self.assertIn("runs as user 65534", job.stderr)  # the store has noticed

    @unittest.skipIf(os.geteuid() != 0, "only root can become another user")
    def test_the_intruder_would_get_in_as_the_same_user(self):
        """The attempts themselves work: what stops them is the user."""
        job, store = self.running("own")
        same = process_rows.INTRUDER.replace("os.setgroups([]); os.setgid(65534); os.setuid(65534)",
                                             "")
        self.assertNotEqual(same, process_rows.INTRUDER)
        found = process_rows.intrude(job, store, os.path.join(self.bench.folder, "own"), same)
        for what in (f"/proc/{store}/environ", "memfd:certkv-arena", "/journal/"):
            self.assertIn(what, found)
        job.wait(60)

    def test_nothing_listens_beyond_this_machine(self):
        for ranks in (0, 2):
            job, store = self.running(f"ports {ranks}", ranks)
            programs = set(job.pids("certkv")) if ranks == 0 else set()
            self.assertTrue(ranks or programs)
            # Open MPI's own sockets in the ranks are between its processes; the store has none.
            for pid in programs | {store}:
                self.assertEqual([a for a in listening(pid) if not is_loopback(a[1])], [], pid)
            self.ends_well(job, f"ports {ranks}")

    def test_a_listener_would_be_seen(self):
        with socket.socket() as one, socket.socket() as other:
            one.bind(("0.0.0.0", 0))
            one.listen()
            other.bind(("127.0.0.1", 0))
            other.listen()
            found = listening(os.getpid())
            self.assertEqual(len([a for a in found if not is_loopback(a[1])]), 1, found)
            self.assertEqual(len(found), 2, found)

    def test_no_secret_stands_on_a_command_line_or_in_a_log(self):
        job, store = self.running("secrets", ranks=2)
        secrets = set()
        for pid, _ in harness.marked_processes(job.mark):
            try:
                with open(f"/proc/{pid}/environ", "rb") as file:
                    pairs = file.read().decode("utf-8", "replace").split("\0")
                with open(f"/proc/{pid}/cmdline", "rb") as file:
                    words = file.read().decode("utf-8", "replace").split("\0")
            except OSError:
                continue
            secrets |= {value for name, _, value in (p.partition("=") for p in pairs)
                        if SECRET.search(name) and name.startswith("CERTKV") and len(value) >= 8}
            # Random names and keys have at least 128 bits: no word of a command line has as many.
            program = os.path.basename(words[0])
            if program in ("certkv", "exe"):
                self.assertFalse([w for w in words if re.search(r"[0-9a-f]{32}", w)], words)
        self.ends_well(job, "secrets")
        for secret in secrets:
            self.assertNotIn(secret, job.stderr + job.stdout)


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], *sys.argv[3:]])
