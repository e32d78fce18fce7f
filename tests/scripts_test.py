#!/usr/bin/env python3
"""The scripts' own decisions, with the machine's commands replaced by stand-ins on PATH."""

import os
import re
import subprocess
import tempfile
import unittest

ROOT = os.path.abspath(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))


class Scripts(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory(prefix="stand in ")
        self.addCleanup(self.folder.cleanup)
        self.calls = os.path.join(self.folder.name, "calls")

    def stand_in(self, name, script):
        path = os.path.join(self.folder.name, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(f'#!/bin/sh\nprintf "%s\\n" "{name} $*" >>"{self.calls}"\n{script}\n')
        os.chmod(path, 0o755)

    def called(self):
        if not os.path.exists(self.calls):
            return []
        with open(self.calls, encoding="utf-8") as file:
            return file.read().splitlines()

    def run_command(self, *command, **environment):
        path = self.folder.name + os.pathsep + os.environ["PATH"]
        return subprocess.run(command, cwd="/", env={**os.environ, "PATH": path, **environment},
                              capture_output=True, text=True, timeout=60, check=False)

    def library(self, script, **environment):
        text = f'set -euo pipefail; cd "{ROOT}"; source launcher/lib.sh; source tests/lib.sh; {script}'
        return self.run_command("bash", "-c", text, **environment)

    def test_help_is_printed_and_wrong_options_are_refused(self):
        for script in ("tests/run", "launcher/quickstart"):
            path = os.path.join(ROOT, script)
            helped = self.run_command(path, "--help")
            self.assertEqual((helped.returncode, helped.stderr), (0, ""))
            self.assertIn(f"usage: ./{script}", helped.stdout)
            for wrong in (["--nonsense"], ["--preset", "gpu"], ["--jobs", "0"], ["--jobs"]):
                refused = self.run_command(path, *wrong)
                self.assertEqual(refused.returncode, 2, wrong)
                self.assertIn(wrong[0], refused.stderr)

    def test_bundle_prints_its_help_and_refuses_wrong_options(self):
        path = os.path.join(ROOT, "launcher/bundle")
        helped = self.run_command(path, "--help")
        self.assertEqual((helped.returncode, helped.stderr), (0, ""))
        self.assertIn("usage: ./launcher/bundle", helped.stdout)
        for wrong in (["--nonsense"], ["--preset", "../x"], ["--build"], ["--output", ""]):
            refused = self.run_command(path, *wrong)
            self.assertEqual(refused.returncode, 2, wrong)
            self.assertIn(wrong[0], refused.stderr)
        # A folder is named as the caller sees it, who stands elsewhere.
        refused = self.run_command(path, "--build", "no/such/build")
        self.assertEqual(refused.returncode, 2)
        self.assertIn("nothing is built in /no/such/build", refused.stderr)

    def test_no_install_refuses_with_the_list_and_the_apt_line(self):
        self.stand_in("dpkg-query", 'for n; do :; done; case $n in libfmt-dev|cmake) exit 1;; esac; '
                      "echo installed")
        self.stand_in("apt-get", "exit 1")
        for script in ("tests/run", "launcher/quickstart"):
            refused = self.run_command(os.path.join(ROOT, script), "--no-install")
            self.assertEqual(refused.returncode, 2)
            self.assertIn("apt-get install cmake libfmt-dev\n", refused.stderr)
        self.assertFalse([c for c in self.called() if c.startswith("apt-get")])

    def test_apt_get_is_not_called_when_nothing_is_missing(self):
        self.stand_in("dpkg-query", "echo installed")
        self.stand_in("apt-get", "exit 1")
        self.stand_in("sudo", "exit 1")
        done = self.library("ensure_packages yes a b")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual([c.split()[0] for c in self.called()], ["dpkg-query"] * 2)

    def test_only_missing_packages_are_installed(self):
        # A package that was removed but not purged is known to dpkg and still missing.
        self.stand_in("dpkg-query", 'for n; do :; done; case $n in b) echo config-files;; '
                      "c) exit 1;; *) echo installed;; esac")
        self.stand_in("apt-get", "exit 0")
        self.stand_in("sudo", 'exec "$@"')
        done = self.library("ensure_packages yes a b c")
        self.assertEqual(done.returncode, 0, done.stderr)
        installs = [c for c in self.called() if re.match("apt-get install", c)]
        self.assertEqual(len(installs), 1)
        self.assertTrue(installs[0].endswith(" b c"), installs)

    def test_a_failed_installation_ends_the_run(self):
        self.stand_in("dpkg-query", "exit 1")
        self.stand_in("apt-get", "exit 100")
        self.stand_in("sudo", 'exec "$@"')
        self.assertNotEqual(self.library("ensure_packages yes a; echo reached").returncode, 0)

    def test_the_driver_decides_and_not_the_toolkit(self):
        self.stand_in("nvcc", "exit 0")
        chosen = 'choose_build "$1"; echo "$preset $build_dir ${configure_args[*]}"'
        chosen = chosen.replace("$1", "%s")
        self.stand_in("nvidia-smi", "exit 9")
        self.assertEqual(self.library(chosen % "").stdout.split(), ["cpu", "build"])
        self.stand_in("nvidia-smi", 'echo "GPU 0: something"')
        self.assertEqual(self.library(chosen % "").stdout.split(),
                         ["cuda", "build"])
        self.assertEqual(self.library(chosen % "cpu").stdout.split(), ["cpu", "build-cpu"])
        self.assertEqual(self.library(chosen % "asan").stdout.split(), ["asan", "build-asan"])

    def architectures(self, known, *options):
        """What CMake compiles CUDA code for with an nvcc that knows these, and what it says."""
        listed = "".join(f"echo compute_{n};" for n in known)
        self.stand_in("nvcc", f'[ "$1" = --list-gpu-arch ] && {{ {listed} }}')
        script = os.path.join(self.folder.name, "ask.cmake")
        with open(script, "w", encoding="utf-8") as file:
            file.write('cmake_minimum_required(VERSION 3.25)\n'
                       f'include("{ROOT}/kernels/base/cmake/CertkvCudaArchitectures.cmake")\n'
                       'message(STATUS "for ${CMAKE_CUDA_ARCHITECTURES}")\n')
        nvcc = os.path.join(self.folder.name, "nvcc")
        ran = self.run_command("cmake", f"-DCMAKE_CUDA_COMPILER={nvcc}", *options, "-P", script)
        self.assertEqual((ran.returncode, ran.stderr), (0, ""))
        return ran.stdout

    def test_architectures_are_cut_to_what_nvcc_knows(self):
        packages = "-DCERTKV_CUDA_ARCHITECTURES=packages"
        new = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
        self.assertEqual(self.architectures(new, packages), "-- for 80;86;89;90;100;120\n")
        old = self.architectures((50, 70, 80, 86, 87, 89, 90), packages)  # CUDA 12.4
        self.assertIn("left out, because this nvcc does not know them: architectures 100;120", old)
        self.assertTrue(old.endswith("-- for 80;86;89;90\n"), old)
        # One that is named is for nvcc to refuse.
        self.assertEqual(self.architectures(new, "-DCERTKV_CUDA_ARCHITECTURES=90;100"),
                         "-- for 90;100\n")
        self.assertEqual(self.architectures(new, packages, "-DCMAKE_CUDA_ARCHITECTURES=86"),
                         "-- for 86\n")
        # Where none is named it is the GPU's own, and sm_90 where no driver answers.
        unnamed = "-DCERTKV_CUDA_ARCHITECTURES="
        self.stand_in("nvidia-smi", "exit 9")
        self.assertEqual(self.architectures(new, unnamed), "-- for 90\n")
        self.stand_in("nvidia-smi", "echo 'GPU 0: a GPU'")
        self.assertEqual(self.architectures(new, unnamed), "-- for native\n")

    def test_jobs_are_at_least_one_and_at_most_the_processors(self):
        self.stand_in("nproc", "echo 100000")
        many = int(self.library("default_jobs").stdout)
        with open("/proc/meminfo", encoding="utf-8") as file:
            available_kb = int(re.search(r"MemAvailable:\s+(\d+)", file.read()).group(1))
        self.assertLessEqual(1, many)
        # Memory may change between the two readings; a quarter is more than it does.
        self.assertLessEqual(many, max(1, available_kb / 1500000 * 1.25))
        self.stand_in("nproc", "echo 1")
        self.assertEqual(self.library("default_jobs").stdout, "1\n")

    def count(self, cases):
        path = os.path.join(self.folder.name, "test.xml")
        with open(path, "w", encoding="utf-8") as file:
            file.write(f"<testsuite>{cases}</testsuite>")
        return self.run_command("python3", os.path.join(ROOT, "tests/support/count_tests.py"), path)

    def test_what_did_not_run_counts_as_failed_unless_it_was_skipped(self):
        run = '<testcase status="run"/>'
        fail = '<testcase status="fail"><failure message=""/></testcase>'
        skip = '<testcase status="notrun"><skipped message="%s"/></testcase>'
        skipped, lost = skip % "SKIP_REGULAR_EXPRESSION_MATCHED", skip % "Unable to find executable"
        self.assertEqual(self.count(run * 3 + fail + skipped + lost).stdout, "3 2 1\n")
        self.assertEqual(self.count(run).returncode, 0)
        self.assertNotEqual(self.count("").returncode, 0)

    def test_the_closing_line_and_the_exit_code_agree(self):
        good = self.library("passed=5 failed=0 skipped=1; close_run")
        self.assertEqual((good.returncode, good.stdout.splitlines()[-1]), (0, "5 passed, 0 failed"))
        bad = self.library("passed=5 failed=1; close_run")
        self.assertEqual((bad.returncode, bad.stdout.splitlines()[-1]), (1, "5 passed, 1 failed"))

    def test_a_failed_build_is_counted_and_its_log_named(self):
        self.stand_in("cmake", "echo broken; exit 1")
        done = self.library(f'cd "{self.folder.name}"; run_stage cpu 1 ""; close_run')
        self.assertEqual(done.returncode, 1)
        self.assertEqual(done.stdout.splitlines()[-1], "0 passed, 1 failed")
        log = os.path.join(self.folder.name, "build-cpu/logs/configure.log")
        self.assertIn(f"full log: {log}", done.stdout)
        with open(log, encoding="utf-8") as file:
            self.assertEqual(file.read(), "broken\n")


if __name__ == "__main__":
    unittest.main()
