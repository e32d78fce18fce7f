#!/usr/bin/env python3
"""certkv run with an audit, and certkv verify on what it left: whole, altered, cut, killed."""

import os
import secrets
import shutil
import signal
import unittest

import harness
import product


class Audit(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.temporary = harness.temporary_folder()
        cls.folder = cls.temporary.name
        product.demo_batch(cls.folder, "reader", [1024], 2)
        cls.run_job("full", "--audit.sample", "1.0", "--compare", "budget,paper,naive,dense",
                    ranks=2).expect_exit(0).expect_nothing_left()
        cls.audit = os.path.join(cls.folder, "full", "audit")

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    @classmethod
    def run_job(cls, name, *arguments, **options):
        return product.run_job(cls.folder, name, *arguments, **options)

    def copy(self, name):
        """The audit in a folder of its own, and its files."""
        copy = os.path.join(self.folder, name)
        shutil.copytree(self.audit, copy)
        files = sorted(os.listdir(copy))
        self.assertEqual(files, ["audit-000-rank-0000.audit", "audit-000-rank-0001.audit"])
        return copy, [os.path.join(copy, file) for file in files]

    def test_a_full_audit_verifies_and_holds_every_head_step(self):
        job = product.certkv("verify", self.audit).expect_exit(0)
        summary = product.read_json(self.folder, "full", "summary.json")
        head_steps = sum(p["head_steps"] for p in summary["policies"].values())
        job.expect_text(f" {head_steps} head-steps checked, 0 violations")
        self.assertGreater(head_steps, 0)
        for policy, s in summary["policies"].items():  # as many of each outcome as the job counted
            rows = {line.split()[1]: int(line.split()[2]) for line in job.stdout.splitlines()
                    if line.startswith(policy + " ")}
            self.assertEqual(rows, {o: s[o] for o in ("certified", "exact", "over", "failed") if s[o]})

    def test_summary_and_manifest_name_the_audit(self):
        named = {"sample": 1.0, "folder": self.audit}
        self.assertEqual(product.read_json(self.folder, "full", "summary.json")["audit"], named)
        sessions = product.read_json(self.folder, "full", "manifest.json")["sessions"]
        self.assertEqual([s["audit"] for s in sessions], [named])

    def test_one_altered_bit_is_found(self):
        copy, files = self.copy("altered")
        with open(files[1], "r+b") as file:
            file.seek(os.path.getsize(files[1]) // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 4]))
        job = product.certkv("verify", copy).expect_exit(3)
        job.expect_text("violation of chain: audit-000-rank-0001.audit", "digest chain is broken")

    def test_a_file_that_was_cut_is_reported_as_truncated(self):
        copy, files = self.copy("cut")
        os.truncate(files[0], os.path.getsize(files[0]) - 100)
        product.certkv("verify", copy).expect_exit(3).expect_text("violation of truncated",
                                                                  "truncated")

    def test_a_missing_rank_is_found(self):
        copy, files = self.copy("missing")
        os.remove(files[1])
        product.certkv("verify", copy).expect_exit(3).expect_text("the file of rank 1 of 2 is missing")

    def test_wrong_arguments_end_with_2(self):
        product.certkv("verify").expect_exit(2).expect_text("certkv verify FOLDER")
        product.certkv("verify", os.path.join(self.folder, "none")).expect_exit(2)
        product.certkv("verify", self.folder).expect_exit(2).expect_text("no audit files")

    def test_a_sample_in_a_folder_of_its_own_verifies(self):
        folder = os.path.join(self.folder, "sampled audit")
        self.run_job("sampled", "--audit.sample", "0.05", "--audit.folder", folder).expect_exit(0)
        self.assertEqual(os.listdir(folder), ["audit-000-rank-0000.audit"])
        job = product.certkv("verify", folder).expect_exit(0).expect_text(" 0 violations")
        self.assertNotIn(" 0 records,", job.stdout.splitlines()[-1])

    def test_without_a_sample_nothing_is_written(self):
        self.run_job("none").expect_exit(0)
        self.assertNotIn("audit", os.listdir(os.path.join(self.folder, "none")))
        self.assertNotIn("audit", product.read_json(self.folder, "none", "summary.json"))

    def test_a_killed_job_leaves_what_can_be_checked_and_resumes_with_a_file_of_its_own(self):
        arguments = product.job_arguments(self.folder, "killed", "--audit.sample", "1.0")
        job = product.start(*arguments)
        self.addCleanup(job.kill)
        file = os.path.join(self.folder, "killed", "audit", "audit-000-rank-0000.audit")
        # Rows of the prompt alone are 1.3 MB for a context of 1024 tokens.
        job.wait_for(lambda: os.path.exists(file) and os.path.getsize(file) > 1_400_000, 60, "a record")
        for pid in job.pids("certkv"):
            job.signal(signal.SIGKILL, pid)
        job.wait(30)
        product.certkv(*arguments, "--resume").expect_exit(0)
        audit = os.path.dirname(file)
        self.assertEqual(len(os.listdir(audit)), 2)
        product.certkv("verify", audit).expect_exit(3).expect_text("the writer was killed")
        product.certkv("verify", audit, "--allow-truncated").expect_exit(0)

    def test_an_audit_that_cannot_be_written_ends_the_job_by_name(self):
        # A limit on file sizes stands for the full disk; the store's memory is not to fall under it.
        socket = "@certkv-audit-" + secrets.token_hex(8)
        store = product.start("store", "--arena", "32MiB", "--socket", socket)
        self.addCleanup(store.kill)
        store.wait_for(lambda: socket in store.stdout, 30, "the store's socket")
        command = product.command(product.job_arguments(
            self.folder, "full disk", "--audit.sample", "1", "--store.mode", "attach",
            "--store.socket", socket))
        job = harness.run(["bash", "-c", 'ulimit -f 1024; exec "$0" "$@"', *command], timeout_s=100)
        job.expect_exit(4).expect_text("audit-000-rank-0000.audit: writing failed", "--resume")
        store.wait(30)


if __name__ == "__main__":
    product.main()
