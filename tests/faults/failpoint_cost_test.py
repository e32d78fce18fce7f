#!/usr/bin/env python3
"""What failpoints cost: nothing in a build without them, a load and a branch where none is set.

    failpoint_cost_test.py BUILD_DIR
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import unittest

ROOT = os.path.abspath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
BUILD = None
LAYERS = ("kernels", "parallel", "kvstore", "runtime", "launcher")
USE = re.compile(r"\bCERTKV_FAILPOINT(?:_BYTES|_FORCED)?\(\s*(\w+)|failpoint::Point::(\w+)")

SNIPPET = """
#include "kernels/base/failpoint.h"
void work();
void with() { CERTKV_FAILPOINT(engine_step); work(); }
void without() { work(); }
"""


def sources():
    for layer in LAYERS:
        for folder, _, names in os.walk(os.path.join(ROOT, layer)):
            for name in names:
                if name.endswith((".cc", ".h", ".inc", ".cu", ".cuh")):
                    path = os.path.join(folder, name)
                    with open(path, encoding="utf-8") as file:
                        yield os.path.relpath(path, ROOT), file.read()


def compile_commands():
    """source -> its command, as arguments, without the compiler cache."""
    with open(os.path.join(BUILD, "compile_commands.json"), encoding="utf-8") as file:
        found = {}
        for entry in json.load(file):
            words = [w for w in shlex.split(entry["command"]) if os.path.basename(w) != "ccache"]
            found.setdefault(os.path.relpath(entry["file"], ROOT), words)
        return found


def without_output(words):
    out = words.index("-o")
    return words[:out] + words[out + 2:]


class FailpointCost(unittest.TestCase):
    def test_a_build_without_them_has_none(self):
        """What the compiler sees of every file that names one, with CERTKV_FAILPOINTS off."""
        commands, users = compile_commands(), 0
        for path, text in sources():
            if path not in commands or "kernels/base/failpoint.h" not in text:
                continue
            users += 1
            words = [w for w in without_output(commands[path])
                     if not w.startswith("-DCERTKV_FAILPOINTS") and w != "-c"]
            seen = subprocess.run([*words, "-E", "-P"], capture_output=True, text=True, timeout=60,
                                  cwd=BUILD, check=False)
            self.assertEqual(seen.returncode, 0, seen.stderr)
            found = re.search(r"failpoint::|CERTKV_FAILPOINT(_|\()", seen.stdout)
            self.assertIsNone(found, path)
        self.assertGreater(users, 15)

    def test_one_that_is_not_set_costs_a_load_and_a_branch(self):
        words = without_output(compile_commands()["kernels/base/error.cc"])
        words = [w for w in words if not w.endswith("error.cc") and w != "-c"
                 and not w.startswith(("-fsanitize", "-g"))]
        with tempfile.TemporaryDirectory() as folder:
            snippet = os.path.join(folder, "snippet.cc")
            with open(snippet, "w", encoding="utf-8") as file:
                file.write(SNIPPET)
            assembly = subprocess.run([*words, "-DCERTKV_FAILPOINTS=1", "-O2", "-S", "-o", "-",
                                       snippet], capture_output=True, text=True, timeout=60,
                                      cwd=BUILD, check=True).stdout
        if os.uname().machine != "x86_64":
            self.skipTest("the instructions are counted on x86-64 alone")
        more = self.straight(assembly, "_Z4withv")
        less = self.straight(assembly, "_Z7withoutv")
        # Address of the table (position-independent code), load, test, branch.
        self.assertLessEqual(len(more) - len(less), 4, more)
        self.assertEqual(sum(re.match(r"j(?!mp)", i) is not None for i in more), 1, more)
        self.assertFalse([i for i in more if re.match(r"(call|lock|mfence|xchg)", i)], more)

    @staticmethod
    def straight(assembly, name):
        """The instructions of a function up to its end, no branch taken."""
        body = assembly[assembly.index(f"\n{name}:") + 1:].splitlines()[1:]
        out = []
        for line in map(str.strip, body):
            if not line or line.startswith((".", "#")) or line.endswith(":"):
                continue
            out.append(line)
            if re.match(r"(ret|jmp)\b", line):
                return out
        raise AssertionError(f"{name} does not end")

    def test_none_lies_in_the_arithmetic(self):
        found = [path for path, text in sources()
                 if USE.search(text) and path.startswith("kernels/")
                 and not path.startswith("kernels/base/failpoint")]
        self.assertEqual(found, [])

    def test_every_name_of_the_list_is_a_place_and_every_place_is_listed(self):
        with open(os.path.join(ROOT, "kernels/base/failpoints.inc"), encoding="utf-8") as file:
            listed = set(re.findall(r"^CERTKV_FAILPOINT_ROW\((\w+)", file.read(), re.M))
        used = {a or b for path, text in sources() if not path.startswith("kernels/base/failpoint")
                for a, b in USE.findall(text)}
        self.assertEqual(listed - used, set(), "listed, and nowhere in the code")
        self.assertEqual(used - listed, set())


if __name__ == "__main__":
    BUILD = os.path.abspath(sys.argv[1])
    unittest.main(argv=[sys.argv[0], "-v", *sys.argv[2:]])
