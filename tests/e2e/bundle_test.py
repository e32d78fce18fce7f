#!/usr/bin/env python3
"""launcher/bundle: a build that was packed and moved runs without the machine's own Open MPI."""

import glob
import os
import re
import shutil
import subprocess
import unittest

import harness
import product

ROOT = os.path.abspath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
LIMIT_BYTES = 60_000_000
# What belongs to the machine the folder is carried to.
STAYS_BEHIND = re.compile(
    r"(ld-linux.*|lib(c|m|dl|pthread|rt|resolv|util))\.so\.[0-9]+"
    r"|lib(cuda|cudart|cublas|cublasLt|cudnn.*|nccl.*|nvidia.*|ibverbs|rdmacm|fabric)\.so.*")
GLIBC = re.compile(r"(ld-linux.*|lib(c|m|dl|pthread|rt|resolv|util))\.so\.[0-9]+")
# What the script `run` is written with. No mpirun, no ssh.
TOOLS = ("sh", "readlink", "dirname", "id")


def pack(*options):
    return subprocess.run([os.path.join(ROOT, "launcher/bundle"), *options], capture_output=True,
                          text=True, timeout=100, check=False)


class Bundle(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.temporary = harness.temporary_folder()
        cls.addClassCleanup(cls.temporary.cleanup)
        cls.folder = cls.temporary.name
        cls.build = os.path.dirname(os.path.dirname(product.PROGRAM))
        packed = os.path.join(cls.folder, "packed")
        cls.said = pack("--build", cls.build, "--output", packed)
        assert cls.said.returncode == 0, cls.said.stderr
        cls.bundle = os.path.join(cls.folder, "moved", "here it is")
        os.makedirs(os.path.dirname(cls.bundle))
        os.rename(packed, cls.bundle)
        cls.bin = os.path.join(cls.folder, "bin")
        os.mkdir(cls.bin)
        for tool in TOOLS:
            os.symlink(shutil.which(tool), os.path.join(cls.bin, tool))

    def run_in_bundle(self, *command, **more):
        """Through `run`, with nothing in the environment but a PATH of four tools."""
        environment = [f"{name}={value}" for name, value in more.items()]
        job = harness.run(["env", "-i", f"PATH={self.bin}", *environment,
                           os.path.join(self.bundle, "run"), *map(str, command)],
                          cwd=self.folder, timeout_s=60)
        return job.expect_exit(0)

    def files(self):
        return [os.path.join(folder, name) for folder, _, names in os.walk(self.bundle)
                for name in names]

    def test_it_is_small_and_holds_nothing_that_belongs_to_the_target(self):
        names = {os.path.basename(path) for path in self.files()}
        self.assertFalse([name for name in names if STAYS_BEHIND.fullmatch(name)])
        # The pattern would see them; and what must be there is.
        for name in ("libcuda.so.1", "libcublasLt.so.13", "libcudnn.so.9", "libnccl.so.2",
                     "libc.so.6", "ld-linux-x86-64.so.2"):
            self.assertTrue(STAYS_BEHIND.fullmatch(name))
        for name in ("certkv", "mpirun", "orted", "libmpi.so.40", "libstdc++.so.6", "mca_pml_ob1.so"):
            self.assertIn(name, names)
        size = sum(os.path.getsize(path) for path in self.files() if not os.path.islink(path))
        self.assertLessEqual(size, LIMIT_BYTES)
        self.assertIn(f"{size / 1e6:.1f} MB", self.said.stdout)
        for path in filter(os.path.islink, self.files()):
            self.assertFalse(os.path.isabs(os.readlink(path)), path)

    def test_certkv_runs_by_itself(self):
        for command in ([], ["certkv", "--help"]):
            self.run_in_bundle(*command).expect_text("usage: certkv", "doctor")
        self.run_in_bundle("certkv", "doctor").expect_text("Open MPI", "OpenBLAS", "backend")

    def test_two_ranks_answer_with_everything_from_the_bundle(self):
        product.demo_batch(os.path.join(self.folder, "demo"), "needle", [512], 1)
        self.run_in_bundle("certkv", "make-model", "needle", "--output", "model")
        loads = os.path.join(self.folder, "loads")
        os.mkdir(loads)
        self.run_in_bundle("mpirun", "-np", 2, "--oversubscribe", "--bind-to", "none", "certkv",
                           "run", "--model", "model", "--input", "demo/batch.jsonl", "--output",
                           "run", "--parallel.threads", 1, OPENBLAS_NUM_THREADS=1, LD_DEBUG="files",
                           LD_DEBUG_OUTPUT=os.path.join(loads, "of")).expect_nothing_left()
        answers = product.lines(self.folder, "demo", "answers.jsonl")
        given = product.texts(self.folder, "run", "results.jsonl")
        self.assertEqual({i: text.strip() for i, text in given.items()},
                         {line["custom_id"]: line["expected"] for line in answers})

        # What the loader mapped into mpirun, the ranks and the store, of the bundle's own programs.
        inside, outside = set(), set()
        for path in glob.glob(os.path.join(loads, "of.*")):
            with open(path, encoding="utf-8", errors="replace") as file:
                text = file.read()
            if f"{self.bundle}/lib/" not in text:  # one of the four tools
                continue
            for library in re.findall(r"calling init: (.*)", text):
                (inside if library.startswith(self.bundle + "/") else outside).add(library)
        names = {os.path.basename(library) for library in inside}
        self.assertLessEqual({"libmpi.so.40", "libopenblas.so.0", "libpmix.so.2", "libucp.so.0"},
                             names)
        self.assertTrue([name for name in names if name.startswith("mca_pmix_")], names)
        self.assertFalse([p for p in outside if not GLIBC.fullmatch(os.path.basename(p))])

    def test_packing_again_gives_the_same_bytes(self):
        again = os.path.join(self.folder, "again")
        self.assertEqual(pack("--build", self.build, "--output", again).returncode, 0)
        compared = subprocess.run(["diff", "-r", again, self.bundle], capture_output=True, text=True,
                                  check=False)
        self.assertEqual((compared.returncode, compared.stdout), (0, ""))
        shutil.rmtree(again)

    def test_too_large_a_program_is_refused_with_the_largest_files(self):
        build = os.path.join(self.folder, "large", "bin")
        os.makedirs(build)
        padding = os.path.join(self.folder, "padding")
        with open(padding, "wb") as file:
            file.truncate(LIMIT_BYTES)
        subprocess.run(["objcopy", "--add-section", f"padding={padding}", product.PROGRAM,
                        os.path.join(build, "certkv")], check=True)
        output = os.path.join(self.folder, "too large")
        refused = pack("--build", os.path.dirname(build), "--output", output)
        self.assertEqual(refused.returncode, 1)
        self.assertIn("more than 60 MB", refused.stderr)
        self.assertRegex(refused.stderr, r"\n +[0-9.]+ MB  bin/certkv\n")
        self.assertFalse(glob.glob(glob.escape(output) + "*"), "something was left behind")


class BundleRefusals(unittest.TestCase):
    def test_nothing_built_and_an_output_in_use_are_named(self):
        with harness.temporary_folder() as folder:
            refused = pack("--build", folder)
            self.assertEqual(refused.returncode, 2)
            self.assertIn(f"nothing is built in {folder}", refused.stderr)
            kept = os.path.join(folder, "kept")
            with open(kept, "w", encoding="utf-8") as file:
                file.write("mine")
            build = os.path.dirname(os.path.dirname(product.PROGRAM))
            for output, why in ((folder, "not empty"), (kept, "not a folder")):
                refused = pack("--build", build, "--output", output)
                self.assertEqual(refused.returncode, 2)
                self.assertIn(why, refused.stderr)
            self.assertEqual(os.listdir(folder), ["kept"])


if __name__ == "__main__":
    product.main()
