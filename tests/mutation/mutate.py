#!/usr/bin/env python3
"""Applies small mutations to the certified core, one at a time, and sees whether its unit tests notice.

    tests/mutation/mutate.py [--check] [--only REGEX] [--jobs N] [--output FILE]

Works on a copy of the tree in a temporary folder; the checkout is never touched. For each entry of
mutations.toml it replaces one piece of text, builds the program certify_units (tests/mutation/
CMakeLists.txt), and runs it until the first failure. A mutation that no test notices has survived; the
data file must say why that is harmless (`survives = "..."`), or a test must be written.

--check only verifies that every entry's text occurs exactly once in its file.

Exit code: 0 every mutation was killed or its survival is argued; 1 some survived without a reason, or
were killed although a reason is given; 2 an entry is stale or does not compile, or the tests fail on
the tree as it is.
"""

import argparse
import datetime
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
DATA = os.path.join(HERE, "mutations.toml")
FIELDS = {"name", "file", "search", "replace", "survives"}
BUILD_SECONDS, TEST_SECONDS = 1200, 300
# Enough to reach every class of input; the counts of the default tier would take longer.
ENVIRONMENT = {"CERTKV_HEAD_STEPS": "2000", "OPENBLAS_NUM_THREADS": "1"}
# Tests that take longer than the others run after them.
SLOW = "Patterns.*:*NeverErrs*:Rounding.*:*ThreadsAndRanks*:*ScalingValues*:*ASinkAbove*:*Adversary*"
FAILED = re.compile(r"^\[  FAILED  \] ([\w/.]+)", re.M)
RUNNING = re.compile(r"^\[ RUN      \] ([\w/.]+)", re.M)


def load(path=DATA):
    """The mutations of the data file. Raises ValueError naming a malformed entry."""
    with open(path, "rb") as file:
        entries = tomllib.load(file)["mutation"]
    names = set()
    for entry in entries:
        missing = {"name", "file", "search", "replace"} - entry.keys()
        if missing or entry.keys() - FIELDS:
            raise ValueError(f"{entry.get('name', entry)}: needs name, file, search and replace, "
                             "and may have survives")
        if entry["name"] in names:
            raise ValueError(f"{entry['name']}: this name is used twice")
        if entry["search"] == entry["replace"]:
            raise ValueError(f"{entry['name']}: replaces a text by itself")
        names.add(entry["name"])
    return entries


def stale(entries, root):
    """One line for each entry whose text does not occur exactly once."""
    findings = []
    for entry in entries:
        path = os.path.join(root, entry["file"])
        if not os.path.exists(path):
            findings.append(f"stale mutation '{entry['name']}': there is no {entry['file']}")
            continue
        with open(path, encoding="utf-8") as file:
            count = file.read().count(entry["search"])
        if count != 1:
            findings.append(f"stale mutation '{entry['name']}': its text occurs {count} times in "
                            f"{entry['file']}, and must occur once")
    return findings


def copy_tree(to):
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True, capture_output=True, timeout=60).stdout.decode().split("\0")
    for path in filter(None, listed):
        source, target = os.path.join(ROOT, path), os.path.join(to, path)
        if not os.path.isfile(source) or path.startswith(("launcher/demo/", "tests/golden/")):
            continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copy2(source, target)


class Tree:
    """A copy of the tree with a build folder in it."""

    def __init__(self, folder, jobs):
        self.source = os.path.join(folder, "certkv")
        self.build_folder = os.path.join(folder, "build")
        self.jobs = jobs
        self.environment = dict(os.environ, **ENVIRONMENT, CCACHE_BASEDIR=folder,
                                CCACHE_NOHASHDIR="1")
        copy_tree(self.source)

    def configure(self):
        # -O1 without debug information: a third of the time to compile, and fast enough to run. -w:
        # a mutation may leave a variable without use.
        return self._call(["cmake", "--preset", "cpu", "-S", self.source, "-B", self.build_folder,
                           "-DCMAKE_BUILD_TYPE=Mutation", "-DCMAKE_CXX_FLAGS_MUTATION=-O1 -w"],
                          BUILD_SECONDS, cwd=self.source)

    def build(self):
        return self._call(["cmake", "--build", self.build_folder, "--target", "certify_units", "-j",
                           str(self.jobs)], BUILD_SECONDS)

    def test(self):
        for which in ("-" + SLOW, SLOW):
            code, output = self._call([os.path.join(self.build_folder, "bin", "certify_units"),
                                       "--gtest_fail_fast", "--gtest_color=no",
                                       f"--gtest_filter={which}"], TEST_SECONDS)
            if code != 0:
                break
        return code, output

    def _call(self, command, seconds, cwd=None):
        """(exit code, output); 124 where the time ran out."""
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  timeout=seconds, env=self.environment, cwd=cwd, check=False)
            return done.returncode, done.stdout.decode("utf-8", "replace")
        except subprocess.TimeoutExpired as e:
            return 124, (e.stdout or b"").decode("utf-8", "replace")


def killer(code, output):
    """The name of the test that failed, crashed or did not end."""
    failed, running = FAILED.search(output), RUNNING.findall(output)
    if failed:
        return failed.group(1)
    last = running[-1] if running else "start"
    return f"{last} ({'no end' if code == 124 else f'ended by {code}'})"


def mutate(tree, entry):
    """'killed', 'survived' or 'invalid', and by which test or why."""
    path = os.path.join(tree.source, entry["file"])
    with open(path, encoding="utf-8") as file:
        original = file.read()
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(original.replace(entry["search"], entry["replace"]))
        code, output = tree.build()
        if code != 0:
            errors = [line for line in output.splitlines() if "error: " in line]
            return "invalid", (errors or output.splitlines() or ["?"])[0].strip()
        code, output = tree.test()
        return ("survived", "") if code == 0 else ("killed", killer(code, output))
    finally:
        with open(path, "w", encoding="utf-8") as file:
            file.write(original)


def head_commit():
    try:
        return subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], check=True,
                              capture_output=True, timeout=30).stdout.decode().strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def report(results, command, seconds):
    count = {k: sum(r[1] == k for r in results) for k in ("killed", "survived", "invalid")}
    lines = ["# Mutations of the certified core", "",
             f"`{command}`, {datetime.date.today().isoformat()}, commit {head_commit()}: "
             f"{len(results)} mutations, {count['killed']} killed, {count['survived']} survived"
             + (f", {count['invalid']} did not compile" if count["invalid"] else "")
             + f"; {seconds / 60:.0f} minutes.", "",
             "Each is one replacement in `mutations.toml`; the tests are the program `certify_units`,",
             "stopped at the first failure. Survivors are argued there, and here.", "",
             "| mutation | file | outcome | test that noticed, or why none can |", "|---|---|---|---|"]
    for entry, outcome, detail in results:
        said = f"`{detail}`" if outcome == "killed" else entry.get("survives", detail or "**not argued**")
        lines.append(f"| {entry['name']} | {entry['file']} | {outcome} | {said} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--check", action="store_true", help="only see whether every entry applies")
    parser.add_argument("--only", default="", metavar="REGEX", help="mutations whose name or file match")
    parser.add_argument("--jobs", type=int, default=2, help="compile with N jobs (default: 2)")
    parser.add_argument("--output", metavar="FILE", help="write the table there (RESULTS.md)")
    arguments = parser.parse_args()
    try:
        entries = load()
    except (ValueError, KeyError, tomllib.TOMLDecodeError) as e:
        print(f"{DATA}: {e}")
        return 2
    findings = stale(entries, ROOT)
    if findings or arguments.check:
        print("\n".join(findings) or f"all {len(entries)} mutations apply")
        return 2 if findings else 0
    entries = [e for e in entries
               if re.search(arguments.only, e["name"]) or re.search(arguments.only, e["file"])]
    start = time.monotonic()
    results = []
    with tempfile.TemporaryDirectory(prefix="certkv-mutation-") as folder:
        tree = Tree(folder, arguments.jobs)
        for what in (tree.configure, tree.build, tree.test):
            code, output = what()
            if code != 0:
                print(output[-4000:])
                print(f"the tree as it is: {what.__name__} ended with {code}")
                return 2
        print(f"built and tested unmutated after {time.monotonic() - start:.0f} s", flush=True)
        for entry in entries:
            before = time.monotonic()
            outcome, detail = mutate(tree, entry)
            results.append((entry, outcome, detail))
            print(f"{outcome:8} {entry['name']} [{time.monotonic() - before:.0f} s] {detail}",
                  flush=True)
    seconds = time.monotonic() - start
    command = "tests/mutation/mutate.py" + (f" --only '{arguments.only}'" if arguments.only else "")
    text = report(results, command, seconds)
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            file.write(text)
    invalid = [e["name"] for e, outcome, _ in results if outcome == "invalid"]
    wrong = [e["name"] for e, outcome, _ in results
             if (outcome == "survived") != ("survives" in e) and outcome != "invalid"]
    print(text.split("\n")[2])
    for name in wrong:
        print(f"not as the data file says: {name}")
    return 2 if invalid else 1 if wrong else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the copy is removed
    sys.exit(main())
