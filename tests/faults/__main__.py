#!/usr/bin/env python3
"""The fault campaign: end-to-end jobs on the demo model with one fault each, compared with the same
job without a fault, every certificate recomputed in float64.

    python3 tests/faults --count N [--seed S] [--only ROW[,ROW..]] [--build DIR] [--jobs J]
                         [--output DIR] [--processes SHARE] [--also FAILPOINTS]

Injection i of seed S is the same whatever the count: it has a row, and everything drawn in it comes
from (row, S, i). What is done already in --output is not done again, so a campaign can be stopped,
resumed and extended. Most faults are injected into jobs of one process, with ranks as threads
(faults_worker); --processes is the share (default 0.02) of those that need a process to kill.
A row and a seed alone:  python3 tests/faults --only ROW --first I --count 1 --seed S

Writes DIR/injections.jsonl (one line each) and DIR/table.md. Exit code: 0 no violation of S, 1 some,
2 wrong arguments.
"""

import argparse
import collections
import json
import os
import queue
import random
import select
import subprocess
import sys
import tempfile
import threading
import time

import jobs
import process_rows
from jobs import NAMED, SAME, UNREACHED, VIOLATION

ROOT = os.path.abspath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
IN_DOUBT = "in doubt"
SILENT_S = 120   # of a worker, for one injection, on the busiest machine
LATE_S = 20      # of an injection in a worker: D is 5 s at most there


def arguments(argv):
    parser = argparse.ArgumentParser(prog="tests/faults", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("--build", default=os.path.join(ROOT, "build"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--output", default="")
    parser.add_argument("--processes", type=float, default=0.02)
    parser.add_argument("--also", default="", help="failpoints of every job in a worker, to take a "
                        "defence away")
    return parser.parse_args(argv)


def list_rows(worker):
    """name -> (row of the fault model, share, what is injected, whether it needs a process)."""
    text = subprocess.run([worker, "--rows"], capture_output=True, text=True, check=True).stdout
    rows = {}
    for line in text.splitlines():
        name, fault, share, what = line.split("\t")
        rows[name] = (int(fault), float(share), what, False)
    for name, (fault, what, share) in process_rows.TABLE.items():
        rows[name] = (fault, share, what, True)
    return rows


def plan(rows, options):
    """[(row, number)] of the injections, each the same whatever the others are."""
    only = [name for name in options.only.split(",") if name]
    for name in only:
        if name not in rows:
            raise SystemExit(f"tests/faults: there is no row '{name}'; there are {', '.join(rows)}")
    inside = {n: r[1] for n, r in rows.items() if not r[3]}
    outside = {n: r[1] for n, r in rows.items() if r[3]}
    todo = []
    for i in range(options.first, options.first + options.count):
        draw = random.Random(f"{options.seed} {i}")
        if only:
            row = only[i % len(only)]
        else:
            shares = outside if draw.random() < options.processes else inside
            row = draw.choices(list(shares), list(shares.values()))[0]
        todo.append((row, options.seed * 10**9 + i))
    return todo


class Worker:
    """faults_worker, started again where it dies."""

    def __init__(self, program, model, folder, also):
        self.command = [program, model, os.path.join(folder, "audit")]
        self.said = os.path.join(folder, "stderr")
        self.environment = {**os.environ, "CERTKV_FAULTS_ALSO": also} if also else None
        self.process = None

    def start(self):
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, env=self.environment,
                                        stdout=subprocess.PIPE, stderr=open(self.said, "wb"))
        if self.line() != "ready":
            raise RuntimeError(f"faults_worker does not start: {self.tail()}")

    def tail(self):
        with open(self.said, "rb") as file:
            return file.read()[-800:].decode("utf-8", "replace")

    def line(self):
        ready, _, _ = select.select([self.process.stdout], [], [], SILENT_S)
        return self.process.stdout.readline().decode("utf-8", "replace").strip() if ready else None

    def inject(self, row, seed):
        if self.process is None:
            self.start()
        try:
            self.process.stdin.write(f"{row} {seed}\n".encode())
            self.process.stdin.flush()
            answer = self.line()
        except BrokenPipeError:
            answer = ""
        if answer:
            found = json.loads(answer)
            found["late"] = found["seconds"] > LATE_S
            return found
        what = f"no answer in {SILENT_S} s" if answer is None else "the process died"
        self.process.kill()
        code = self.process.wait()
        self.process = None
        return {"row": row, "seed": seed, "result": VIOLATION, "late": answer is None, "seconds": 0,
                "text": f"{what} (exit {code}): {self.tail()}"}

    def close(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait(SILENT_S)
            self.process.stdout.close()


def table(rows, found, options, seconds):
    """The results as markdown."""
    count = collections.defaultdict(collections.Counter)
    for f in found:
        count[f["row"]][f["result"]] += 1
        count[f["row"]]["late"] += bool(f["late"])
    columns = (SAME, NAMED, IN_DOUBT, VIOLATION)
    text = [f"`python3 tests/faults --count {options.count} --seed {options.seed}"
            f"{' --only ' + options.only if options.only else ''}`, {seconds:.0f} s with "
            f"{options.jobs} jobs.", "",
            "| row | fault | injected | same answer | named error | in doubt, and said so | violations "
            "of S | D exceeded |", "|---|---|---|---|---|---|---|---|"]
    total = collections.Counter()
    for name, (fault, _, what, _) in sorted(rows.items(), key=lambda item: (item[1][0], item[0])):
        c = count.get(name)
        if not c:
            continue
        met = sum(c[k] for k in columns)
        total.update({**{k: c[k] for k in columns}, "late": c["late"], "met": met})
        text.append(f"| {fault or 'any'} | {what} (`{name}`) | {met} | "
                    + " | ".join(str(c[k]) for k in columns) + f" | {c['late']} |")
    text.append(f"| | all | {total['met']} | " + " | ".join(str(total[k]) for k in columns)
                + f" | {total['late']} |")
    missed = sum(c[UNREACHED] for c in count.values())
    text += ["", f"{missed} more were drawn where the job did not come by, and count as nothing."]
    wrong = [f for f in found if f["result"] == VIOLATION or f["late"]]
    text += [f"- `{f['row']}` seed {f['seed']}: {f['text'][:500]}" for f in wrong[:50]]
    return "\n".join(text) + "\n", total


def main(argv):
    options = arguments(argv)
    program = os.path.join(options.build, "bin", "certkv")
    worker = os.path.join(options.build, "bin", "faults_worker")
    reader = os.path.join(ROOT, "launcher", "demo", "reader")
    for path in (program, worker):
        if not os.access(path, os.X_OK):
            print(f"tests/faults: {path} is not built (it needs -DCERTKV_FAILPOINTS=ON)",
                  file=sys.stderr)
            return 2
    rows = list_rows(worker)
    temporary = tempfile.TemporaryDirectory(prefix="certkv campaign ")
    output = options.output or temporary.name
    os.makedirs(output, exist_ok=True)
    record = os.path.join(output, "injections.jsonl")
    todo = plan(rows, options)
    found = {}
    if os.path.exists(record):
        with open(record, encoding="utf-8") as file:
            for line in file:
                if line.endswith("\n"):
                    one = json.loads(line)
                    found[one["row"], one["seed"]] = one
    waiting = [t for t in todo if t not in found]
    inside, outside = queue.Queue(), queue.Queue()
    for row, seed in waiting:
        (outside if rows[row][3] else inside).put((row, seed))
    begin, lock, failures = time.monotonic(), threading.Lock(), []
    with open(record, "a", encoding="utf-8") as log:
        def note(one):
            with lock:
                found[one["row"], one["seed"]] = one
                log.write(json.dumps(one) + "\n")
                log.flush()
                if one["result"] == VIOLATION or one["late"]:
                    print(f"{one['result']}: {one['row']} {one['seed']}: {one['text'][:400]}",
                          flush=True)

        def drain(work, inject):
            try:
                while not failures:
                    try:
                        row, seed = work.get_nowait()
                    except queue.Empty:
                        return
                    note(inject(row, seed))
            except Exception as error:  # a thread that ends silently would look like success
                failures.append(error)

        def inside_jobs(number):
            folder = os.path.join(temporary.name, f"worker {number}")
            os.makedirs(folder)
            one = Worker(worker, reader, folder, options.also)
            drain(inside, one.inject)
            one.close()

        def outside_jobs(bench):
            drain(outside, lambda row, seed: process_rows.run(bench, row, seed))

        threads = [threading.Thread(target=inside_jobs, args=(n,))
                   for n in range(min(options.jobs, inside.qsize()))]
        bench = None
        if not outside.empty():  # mostly waiting: as many again
            shim = os.path.join(options.build, "bin", "libcertkv_clock_shim.so")
            bench = process_rows.Rows(program, reader, shim if os.path.exists(shim) else None)
            threads += [threading.Thread(target=outside_jobs, args=(bench,))
                        for _ in range(options.jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if bench:
            bench.bench.close()
    if failures:
        raise failures[0]
    text, total = table(rows, [found[t] for t in todo], options, time.monotonic() - begin)
    with open(os.path.join(output, "table.md"), "w", encoding="utf-8") as file:
        file.write(text)
    print(text)
    temporary.cleanup()
    return 1 if total[VIOLATION] or total["late"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
