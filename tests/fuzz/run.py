#!/usr/bin/env python3
"""Runs every libFuzzer program for so many minutes, from its committed corpus, and prints a table.

    tests/fuzz/run.py --build DIR [--minutes N] [--only NAME[,NAME..]] [--jobs J] [--work DIR] [--keep]

DIR is a build with clang and CERTKV_FUZZERS (tests/README.md). New inputs go to --work (default: a
temporary folder); --keep puts the smallest of those that reach new code into tests/fuzz/corpus/NAME, at
most 40 of at most 4 KB each. Exit code: 0 clean, 1 a crash, a leak or a hang: its input lies in
--work; 2 wrong arguments.
"""

import argparse
import concurrent.futures
import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
CORPUS = os.path.join(HERE, "corpus")
KEPT, KEPT_BYTES = 40, 4096
DONE = re.compile(r"^stat::number_of_executed_units:\s*(\d+)", re.M)
STATE = re.compile(r"#(\d+)\s+(?:DONE|pulse|NEW|REDUCE|INITED)\s+cov: (\d+) ft: (\d+) corp: (\d+)")


def corpus_of(name, build, work):
    """The folder to fuzz in: the program's own seeds, the committed inputs, and what came before."""
    folder = os.path.join(work, name)
    os.makedirs(folder, exist_ok=True)
    replay = os.path.join(build, "bin", f"{name}_fuzz_test")
    subprocess.run([replay], env={**os.environ, "CERTKV_FUZZ_CORPUS": folder, "ASAN_OPTIONS":
                                  "detect_leaks=0"}, stdout=subprocess.DEVNULL, timeout=60, check=True)
    for path in glob.glob(os.path.join(CORPUS, name, "*")):
        shutil.copy(path, folder)
    return folder


def fuzz(name, options):
    folder = corpus_of(name, options.build, options.work)
    crashes = os.path.join(options.work, f"{name}-")
    run = subprocess.run(
        [os.path.join(options.build, "bin", f"fuzz_{name}"), folder, f"-artifact_prefix={crashes}",
         f"-max_total_time={round(options.minutes * 60)}", "-print_final_stats=1", "-timeout=20",
         "-rss_limit_mb=2048", "-max_len=8192", "-reload=0"],
        capture_output=True, text=True, errors="replace", check=False,
        env={**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1"})
    with open(os.path.join(options.work, f"{name}.log"), "w", encoding="utf-8") as log:
        log.write(run.stderr)
    states, done = STATE.findall(run.stderr), DONE.findall(run.stderr)
    last = states[-1] if states else ("0", "0", "0", "0")
    found = glob.glob(crashes + "*")
    if options.keep and run.returncode == 0:
        keep(name, folder, options)
    return {"name": name, "code": run.returncode, "executions": int(done[-1]) if done else 0,
            "coverage": last[1], "features": last[2], "corpus": last[3], "found": found,
            "tail": run.stderr[-3000:] if run.returncode else ""}


def keep(name, folder, options):
    """What libFuzzer's merge finds enough for the same coverage, the smallest first."""
    merged = os.path.join(options.work, f"{name}.merged")
    shutil.rmtree(merged, ignore_errors=True)
    os.makedirs(merged)
    subprocess.run([os.path.join(options.build, "bin", f"fuzz_{name}"), "-merge=1", merged, folder],
                   capture_output=True, timeout=600, check=True)
    files = sorted(glob.glob(os.path.join(merged, "*")), key=lambda p: (os.path.getsize(p), p))
    target = os.path.join(CORPUS, name)
    shutil.rmtree(target, ignore_errors=True)
    os.makedirs(target)
    for path in [p for p in files if 0 < os.path.getsize(p) <= KEPT_BYTES][-KEPT:]:
        shutil.copy(path, target)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--only", default="")
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() // 2))
    parser.add_argument("--work", default="")
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    built = sorted(os.path.basename(p)[5:] for p in glob.glob(os.path.join(options.build, "bin", "fuzz_*")))
    wanted = [n for n in options.only.split(",") if n] or built
    if not wanted or set(wanted) - set(built):
        print(f"run.py: {options.build}/bin has the fuzzers {built}, not {wanted}", file=sys.stderr)
        return 2
    options.work = options.work or tempfile.mkdtemp(prefix="certkv-fuzz-")
    os.makedirs(options.work, exist_ok=True)
    print("| target | executions | edges | features | corpus | result |\n|---|---|---|---|---|---|",
          flush=True)
    bad = 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for r in pool.map(lambda name: fuzz(name, options), wanted):
            clean = r["code"] == 0 and not r["found"]
            bad += not clean
            result = "clean" if clean else f"exit {r['code']}: {', '.join(r['found'])}"
            print(f"| `{r['name']}` | {r['executions']:,} | {r['coverage']} | {r['features']} | "
                  f"{r['corpus']} | {result} |", flush=True)
            if not clean:
                print(r["tail"], file=sys.stderr, flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
