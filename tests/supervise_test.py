#!/usr/bin/env python3
"""launcher/certkv-supervise and the Slurm template, with a stand-in for the job that ends as it is told."""

import os
import signal
import subprocess
import tempfile
import time
import unittest

SCRIPT = os.path.abspath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "launcher",
                                      "certkv-supervise"))


class StandIns(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory(prefix="stand in ")
        self.addCleanup(self.folder.cleanup)
        self.calls = self.path("calls")

    def path(self, name):
        return os.path.join(self.folder.name, name)

    def job(self, codes, then=""):
        """A command that notes its arguments and ends with the next of the codes (the last for ever)."""
        with open(self.path("codes"), "w", encoding="utf-8") as file:
            file.write("".join(f"{code}\n" for code in codes))
        path = self.path("mpirun")
        with open(path, "w", encoding="utf-8") as file:
            file.write(f"""#!/bin/bash
printf '%s|' "$@" >>'{self.calls}'; echo >>'{self.calls}'
[[ $1 != --hostfile ]] || cat "$2" >>'{self.path("hosts seen")}'
n=$(wc -l <'{self.calls}'); all=$(wc -l <'{self.path("codes")}')
{then}
exit $(sed -n "$((n < all ? n : all))p" '{self.path("codes")}')
""")
        os.chmod(path, 0o755)
        return path

    def called(self):
        if not os.path.exists(self.calls):
            return []
        with open(self.calls, encoding="utf-8") as file:
            return [line.rstrip("|\n").split("|") for line in file]


class Supervise(StandIns):
    def run_script(self, *arguments):
        return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, timeout=60,
                              check=False)

    def supervised(self, codes, *options, command=("run", "--input", "a file")):
        return self.run_script("--pause", "0.01", *options, "--", self.job(codes), *command)

    def test_help_is_printed_and_wrong_options_are_refused(self):
        helped = self.run_script("--help")
        self.assertEqual((helped.returncode, helped.stderr), (0, ""))
        self.assertIn("usage: launcher/certkv-supervise", helped.stdout)
        for wrong in (["--nonsense"], ["--pause", "soon"], ["--max-restarts", "-1"], ["--ranks"],
                      ["--hostfile", "/no/such/file", "--", "true"], ["--"], []):
            refused = self.run_script(*wrong)
            self.assertEqual(refused.returncode, 2, wrong)
            self.assertIn("certkv-supervise: ", refused.stderr)

    def test_an_end_by_the_jobs_own_will_is_the_end(self):
        for code in (0, 2, 3):
            done = self.supervised([code])
            self.assertEqual(done.returncode, code)
            self.assertEqual(self.called(), [["run", "--input", "a file"]])
            os.unlink(self.calls)

    def test_a_loss_starts_it_again_with_resume_until_it_is_done(self):
        done = self.supervised([137, 4, 1, 134, 0])
        self.assertEqual(done.returncode, 0)
        first, *others = self.called()
        self.assertEqual(first, ["run", "--input", "a file"])
        self.assertEqual(others, [["run", "--input", "a file", "--resume"]] * 4)
        self.assertIn("ended by signal KILL (exit code 137); restart 1 of 5 with --resume in 10 ms",
                      done.stderr)
        self.assertIn("ended with exit code 4; restart 2 of 5 with --resume in 20 ms", done.stderr)
        self.assertIn("in 80 ms", done.stderr)

    def test_resume_is_not_given_twice(self):
        self.assertEqual(self.supervised([4, 0], command=("run", "--resume", "x")).returncode, 0)
        self.assertEqual(self.called(), [["run", "--resume", "x"]] * 2)

    def test_restarts_are_capped_and_the_last_code_is_returned(self):
        done = self.supervised([4, 137], "--max-restarts", "3", "--longest-pause", "0.02")
        self.assertEqual(done.returncode, 137)
        self.assertEqual(len(self.called()), 4)
        self.assertIn("3 restarts in a row have not helped, giving up", done.stderr)
        self.assertNotIn("in 40 ms", done.stderr)

    def test_a_run_that_lasted_is_a_new_beginning(self):
        done = self.supervised([4, 4, 4, 4, 0], "--max-restarts", "1", "--stable", "0")
        self.assertEqual(done.returncode, 0)
        self.assertEqual(len(self.called()), 5)

    def test_the_hostfile_is_read_again_and_hosts_that_are_silent_are_left_out(self):
        hosts = self.path("hosts")
        with open(hosts, "w", encoding="utf-8") as file:
            file.write("# two\nlocalhost slots=2\nnode-b slots=2\nnode-c slots=2 max-slots=4")
        probe = self.path("probe")
        with open(probe, "w", encoding="utf-8") as file:  # node-b is gone; node-d is its replacement
            file.write("#!/bin/sh\ntest \"$1\" != node-b\n")
        os.chmod(probe, 0o755)
        job = self.job([137, 0], then=f"echo 'node-d slots=4' >'{hosts}'")
        done = self.run_script("--pause", "0.01", "--hostfile", hosts, "--probe",
                               "sh " + probe.replace(" ", "?"), "--", job, "-np", "4", "certkv")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("no answer from node-b: left out", done.stderr)
        with open(self.path("hosts seen"), encoding="utf-8") as file:
            self.assertEqual(file.read().splitlines(),
                             ["localhost slots=2", "node-c slots=2 max-slots=4", "node-d slots=4"])
        for call in self.called():
            self.assertEqual(call[0], "--hostfile")
            self.assertEqual(call[2:5], ["-np", "4", "certkv"])

    def test_too_few_slots_are_said_and_waited_for(self):
        hosts = self.path("hosts")
        with open(hosts, "w", encoding="utf-8") as file:
            file.write("localhost slots=2\n")
        done = self.run_script("--pause", "0.01", "--max-restarts", "2", "--hostfile", hosts, "--",
                               self.job([0]), "-np", "4", "certkv")
        self.assertEqual(done.returncode, 4)
        self.assertEqual(self.called(), [])
        self.assertEqual(done.stderr.count("have 2 slots, the job needs 4"), 3)

    def test_signals_are_passed_on_and_end_it(self):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            job = self.job([4], then="trap 'exit 42' INT TERM USR1; touch '%s'; "
                           "for ((i = 0; i < 600; ++i)); do sleep 0.05; done" % self.path("up"))
            process = subprocess.Popen([SCRIPT, "--", job], stderr=subprocess.PIPE, text=True)
            deadline = time.monotonic() + 30
            while not os.path.exists(self.path("up")) and time.monotonic() < deadline:
                time.sleep(0.02)
            process.send_signal(number)
            _, said = process.communicate(timeout=30)
            self.assertEqual(process.returncode, 42, said)
            self.assertIn(f"SIG{number.name[3:]}: passed on", said)
            os.unlink(self.path("up"))
            os.unlink(self.calls)


class SlurmTemplate(StandIns):
    """launcher/certkv.sbatch with a stand-in for srun."""

    TEMPLATE = os.path.join(os.path.dirname(SCRIPT), "certkv.sbatch")

    def run_template(self, *arguments, **environment):
        return subprocess.run([self.TEMPLATE, *arguments], capture_output=True, text=True,
                              timeout=60, check=False, cwd=os.path.dirname(os.path.dirname(SCRIPT)),
                              env={**os.environ, "PATH": self.folder.name + ":" + os.environ["PATH"],
                                   **environment})

    def srun(self, store, codes):
        job = self.job(codes)
        path = self.path("srun")
        with open(path, "w", encoding="utf-8") as file:
            file.write(f"""#!/bin/bash
case " $* " in
  *' store '*) {store} ;;
  *) exec '{job}' "$@" ;;
esac
""")
        os.chmod(path, 0o755)

    LIVING = """for n in 1 2; do echo "store $* is ready"; done; echo $$ >'%s'; exec sleep 60"""

    def test_a_dry_run_prints_the_commands(self):
        done = self.run_template("--model", "a folder", CERTKV_DRY_RUN="1", SLURM_JOB_ID="5",
                                 SLURM_JOB_NUM_NODES="2")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        stores, job = done.stdout.splitlines()
        self.assertIn("--nodes 2 --ntasks 2 --ntasks-per-node 1 build/bin/certkv store", stores)
        self.assertIn("srun --overlap --mpi=pmix", job)
        self.assertIn("run --model a\\ folder --store.mode attach", job)
        self.assertEqual(stores.split("--socket ")[1].split()[0],
                         job.split("--store.socket ")[1].split()[0])

    def test_outside_of_a_job_and_without_arguments_it_is_refused(self):
        self.assertEqual(self.run_template("--model", "x", SLURM_JOB_ID="").returncode, 2)
        self.assertEqual(self.run_template(SLURM_JOB_ID="5").returncode, 2)

    def test_a_lost_rank_costs_a_restart_and_the_stores_end_with_the_job(self):
        self.srun(self.LIVING % self.path("store pid"), [137, 3])
        done = self.run_template("--model", "x", SLURM_JOB_ID="5", SLURM_JOB_NUM_NODES="2",
                                 CERTKV_SUPERVISE=SCRIPT)
        self.assertEqual(done.returncode, 3, done.stderr)
        first, second = self.called()
        self.assertEqual(second, first + ["--resume"])
        with open(self.path("store pid"), encoding="utf-8") as file:
            self.assertFalse(os.path.exists(f"/proc/{file.read().strip()}"))

    def test_stores_that_do_not_start_end_it(self):
        self.srun("exit 2", [0])
        done = self.run_template("--model", "x", SLURM_JOB_ID="5")
        self.assertEqual(done.returncode, 4)
        self.assertIn("a store did not start", done.stderr)
        self.assertEqual(self.called(), [])


if __name__ == "__main__":
    unittest.main()
