#!/usr/bin/env python3
"""Jobs whose every process is killed, beside a store that lives on: --resume goes on with them."""

import os
import re
import secrets
import signal
import unittest

import harness
import product

TOKENS = 150  # of an answer: two pages are sealed on the way
PAGE = 64     # tokens of a page: what is sealed at once
MAGIC, HEADER, ALIGNMENT = b"CKVK", 128, 64  # kvstore/FORMAT.md


class KilledJobs(unittest.TestCase):
    POLICIES = ("dense",)

    @classmethod
    def setUpClass(cls):
        cls.temporary = harness.temporary_folder()
        cls.folder = cls.temporary.name
        product.demo_batch(cls.folder, "reader", [4096], 2)
        lines = product.lines(cls.folder, "batch.jsonl")
        for line in lines:  # beyond the answer, so that there is time to be killed in
            line["body"].update(max_tokens=TOKENS, stop=[])
        product.write_lines(os.path.join(cls.folder, "batch.jsonl"), lines)
        cls.whole = {}
        for policy in cls.POLICIES:
            product.start(*cls.arguments(f"whole {policy}", policy), ranks=2).wait(100) \
                .expect_exit(0)
            cls.whole[policy] = cls.answers(f"whole {policy}")

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    @classmethod
    def arguments(cls, name, policy, *more):
        return product.job_arguments(cls.folder, name, "--deterministic", "true", "--policy",
                                     policy, *more)

    @classmethod
    def answers(cls, name):
        """custom_id -> (text, outcome, head-steps), and every line has exactly one."""
        found = {}
        for line in product.lines(cls.folder, name, "results.jsonl"):
            body = line["response"]["body"]
            assert line["custom_id"] not in found
            found[line["custom_id"]] = (body["choices"][0]["text"], body["certkv"]["outcome"],
                                        body["certkv"]["head_steps"])
        return found

    def start_store(self, socket):
        store = product.start("store", "--arena", "192MiB", "--socket", socket, "--linger_ms", -1,
                              "--attach_within_ms", -1)
        self.addCleanup(store.wait, 10)
        self.addCleanup(store.kill)
        store.wait_for(lambda: socket[1:] in store.stdout, 30, "the store")
        return store

    def job(self, name, policy, socket, *more):
        job = product.start(*self.arguments(name, policy, "--store.mode", "attach",
                                            "--store.socket", socket, *more), ranks=2)
        self.addCleanup(job.kill)
        return job

    def drawn(self, name, line=0, policy="dense"):
        """Tokens of an answer that the job's folder holds."""
        try:
            with open(os.path.join(self.folder, name, "open", f"{line}-{policy}.jsonl"),
                      "rb") as file:
                return sum(b'"t":[' in text for text in file)
        except FileNotFoundError:
            return 0

    def kill_all(self, job, condition, what):
        job.wait_for(condition, 60, what)
        job.kill()
        job.wait(30)

    def resumed(self, name, policy, socket):
        """The resumed job, ended well: every line answered once, nothing left open."""
        job = self.job(name, policy, socket, "--resume").wait(100).expect_exit(0)
        self.assertEqual(os.listdir(os.path.join(self.folder, name, "open")), [])
        return job

    def known(self, job):
        """(known, sealed) tokens that each request of a job went on from, by request."""
        return {int(r): (int(k), int(s)) for r, k, s in re.findall(
            r"request (\d+) .*: goes on behind (\d+) known tokens, (\d+) of them sealed",
            job.stderr)}

    def reused(self, name):
        return [line["response"]["body"]["certkv"]["reused_prompt_tokens"]
                for line in product.lines(self.folder, name, "results.jsonl")]


class ResumedJobs(KilledJobs):
    POLICIES = ("dense", "budget")

    def test_killed_at_any_point_the_same_answers_come(self):
        points = {
            "prefill": lambda name, job: "prefill" in job.stderr or os.path.exists(
                os.path.join(self.folder, name, "manifest.json")),
            "first token": lambda name, job: self.drawn(name) >= 1,
            "mid-decode": lambda name, job: self.drawn(name, 1) >= 100,
        }
        for point, reached in points.items():
            with self.subTest(point):
                socket = f"@certkv-test-{secrets.token_hex(8)}"
                self.start_store(socket)
                name = f"killed {point}"
                job = self.job(name, "dense", socket)
                self.kill_all(job, lambda: reached(name, job), point)
                known = [self.drawn(name, line) for line in (0, 1)]
                second = self.resumed(name, "dense", socket)
                self.assertEqual(self.answers(name), self.whole["dense"])
                for line, count in enumerate(known):
                    if count > 0:
                        self.assertGreaterEqual(self.known(second)[line][0], count - 1)
                if point == "mid-decode":
                    self.assertTrue(all(sealed > 100 - PAGE for _, sealed in self.known(second).values()))
                    self.assertTrue(all(tokens >= 3584 for tokens in self.reused(name)))

    def test_under_budget_the_answers_and_outcomes_are_the_same(self):
        socket = f"@certkv-test-{secrets.token_hex(8)}"
        self.start_store(socket)
        job = self.job("budget", "budget", socket)
        self.kill_all(job, lambda: self.drawn("budget", 1, "budget") >= 100, "mid-decode")
        second = self.resumed("budget", "budget", socket)
        self.assertTrue(all(sealed > 100 - PAGE for _, sealed in self.known(second).values()))
        for line, (text, outcome, steps) in self.answers("budget").items():
            whole = self.whole["budget"][line]
            self.assertEqual(text.split(".")[0], whole[0].split(".")[0])
            self.assertEqual((outcome, steps), whole[1:])

    def test_killed_between_an_answers_last_token_and_the_journal(self):
        socket = f"@certkv-test-{secrets.token_hex(8)}"
        self.start_store(socket)
        name = "last token"
        job = self.job(name, "dense", socket, "--max-num-seqs", "1")
        path = os.path.join(self.folder, name, "open", "0-dense.jsonl")
        job.wait_for(lambda: os.path.exists(path), 60, "the first answer")
        kept = os.path.join(self.folder, "kept.jsonl")
        os.link(path, kept)  # what is written to it before it is removed stays
        self.kill_all(job, lambda: self.drawn(name, 1) >= 1, "the second answer")
        journal = os.path.join(self.folder, name, "journal", "replica-0.jsonl")
        with open(journal, "rb") as file:
            lines = file.read().splitlines(keepends=True)
        self.assertEqual(len(lines), 2)
        with open(journal, "wb") as file:
            file.write(lines[0])  # its header: the answer never came to be written
        os.rename(kept, path)
        self.assertEqual(self.drawn(name), TOKENS)
        second = self.resumed(name, "dense", socket)
        self.assertEqual(self.known(second)[0][0], TOKENS)
        self.assertEqual(self.answers(name), self.whole["dense"])

    def test_a_store_that_was_lost_meanwhile_is_said_and_everything_is_made_again(self):
        socket = f"@certkv-test-{secrets.token_hex(8)}"
        store = self.start_store(socket)
        job = self.job("lost", "budget", socket)
        self.kill_all(job, lambda: self.drawn("lost", 1, "budget") >= 100, "mid-decode")
        store.kill()
        store.wait(10)
        self.start_store(socket)
        second = self.resumed("lost", "budget", socket)
        second.expect_text("its answer's originals are not in the store")
        self.assertTrue(all(sealed == 0 for _, sealed in self.known(second).values()))
        # Every step is done again, with the known tokens: the same bits.
        self.assertEqual(self.answers("lost"), self.whole["budget"])

    def test_damaged_originals_are_found_and_never_become_text(self):
        socket = f"@certkv-test-{secrets.token_hex(8)}"
        store = self.start_store(socket)
        job = self.job("damaged", "dense", socket)
        self.kill_all(job, lambda: self.drawn("damaged", 1) >= 100, "mid-decode")
        self.assertGreater(damage(store.pids("certkv")[0]), 100)
        second = self.resumed("damaged", "dense", socket)
        second.expect_text("its prompt is prefilled from the first token",
                           "its answer's originals are not in the store, or not sound")
        self.assertEqual(self.answers("damaged"), self.whole["dense"])


class SupervisedJobs(KilledJobs):
    """The same batch under launcher/certkv-supervise."""

    def test_a_killed_rank_costs_a_restart_and_the_answers_come(self):
        socket = f"@certkv-test-{secrets.token_hex(8)}"
        self.start_store(socket)
        name = "supervised"
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "launcher",
                              "certkv-supervise")
        job = harness.start([script, "--pause", "0.1", "--", *harness.mpirun(2),
                             *product.command(self.arguments(
                                 name, "dense", "--store.mode", "attach", "--store.socket",
                                 socket))])
        self.addCleanup(job.kill)
        job.wait_for(lambda: self.drawn(name, 1) >= 100, 60, "mid-decode")
        os.kill(job.pids("certkv")[1], signal.SIGKILL)
        job.wait(100).expect_exit(0).expect_nothing_left()
        job.expect_text("ended by signal KILL (exit code 137); restart 1 of 5 with --resume",
                        "the job ended with exit code 0 after 1 restart(s) in a row")
        self.assertTrue(all(sealed > 100 - PAGE for _, sealed in self.known(job).values()))
        self.assertEqual(self.answers(name), self.whole["dense"])


def damage(pid):
    """Flips a bit in the keys of every sealed block that a store holds; returns how many."""
    count = 0
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            if "memfd:" not in os.readlink(f"/proc/{pid}/fd/{fd}"):
                continue
        except FileNotFoundError:  # the connection of a rank that was killed
            continue
        with open(f"/proc/{pid}/fd/{fd}", "r+b") as arena:
            data = arena.read()
            at = data.find(MAGIC)
            while at >= 0:
                if at % ALIGNMENT == 0 and data[at + HEADER - 8:at + HEADER] != bytes(8):
                    arena.seek(at + HEADER + 3)
                    arena.write(bytes([data[at + HEADER + 3] ^ 8]))
                    count += 1
                at = data.find(MAGIC, at + 1)
    return count


if __name__ == "__main__":
    product.main()
