"""Faults that need a process of its own: killed, stopped, starved, watched by another user."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import failpoints
import jobs
from jobs import NAMED, SAME, UNREACHED, VIOLATION, Outcome, harness, product

SLOW = "engine.decode=sleep:60"  # six steps: time to be hit between two of them
NOBODY = 65534


class Rows:
    """Each method takes a random.Random and a job's name, and gives an Outcome."""

    def __init__(self, program, reader, clock_shim=None):
        self.bench = jobs.Bench(program, reader, extra=["--cache.scrub_steps", 1])
        self.clock_shim = clock_shim
        self.points = [(n, a) for n, a in failpoints.table() if n not in failpoints.DISABLES]

    # ---- helpers --------------------------------------------------------------------------------

    def ends(self, job, name, begin, pause_s=0.0, ranks=0, killed=(), ended_by=()):
        limit = self.bench.job_seconds + 6 * 0.06 + pause_s + 4 * jobs.DEADLINE_S + jobs.GRACE_S
        seconds = jobs.ended_after(job, begin, limit + 20)
        outcome = self.bench.judge(job, name, limit, seconds, killed=killed, ended_by=ended_by)
        if outcome.result == NAMED:
            wrong = self.bench.resume(name, ranks=ranks)
            if wrong:
                outcome = Outcome(VIOLATION, f"{outcome.text}; {wrong}", seconds, outcome.late)
        self.bench.drop(name)
        return outcome

    def store_of(self, job, timeout_s=20):
        """Process of the job's store; 0 where the job ends before it has one."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            found = jobs.STORE.search(job.stderr)
            if found:
                return int(found.group(1))
            if job.process.poll() is not None:
                return 0
            time.sleep(0.005)
        return 0

    def signal_store(self, draw, name, number, ranks):
        begin = time.monotonic()
        job = self.bench.start(name, ranks=ranks, env={"CERTKV_FAILPOINT": SLOW})
        store = self.store_of(job)
        time.sleep(draw.uniform(0, 0.6))
        reached = kill(store, number)
        pause = 0
        if number == signal.SIGSTOP and reached:
            pause = draw.choice((0.2, 4))
            time.sleep(pause)
            kill(store, signal.SIGCONT if pause < 1 else signal.SIGKILL)
        outcome = self.ends(job, name, begin, pause, ranks)
        return outcome if reached or outcome.result == VIOLATION else Outcome(UNREACHED, "too late")

    # ---- rows -----------------------------------------------------------------------------------

    def store_killed(self, draw, name):
        return self.signal_store(draw, name, signal.SIGKILL, draw.choice((0, 0, 2)))

    def store_stopped(self, draw, name):
        return self.signal_store(draw, name, signal.SIGSTOP, 0)

    def rank_killed(self, draw, name):
        point = draw.choice(("engine.step", "engine.plan", "engine.prefill", "engine.decode",
                             "engine.agree", "engine.sample", "engine.finish", "ranks.wait",
                             "client.seal", "reader.batch", "cache.verdict"))
        spec = f"{point}=panic,rank={draw.randrange(2)},skip={draw.randrange(6)}"
        log = os.path.join(self.bench.folder, name + ".log")
        begin = time.monotonic()
        job = self.bench.start(name, ranks=2, env={"CERTKV_FAILPOINT": spec,
                                                   "CERTKV_FAILPOINT_LOG": log})
        job.process.wait(60)
        met = jobs.fired(log)
        outcome = self.ends(job, name, begin, 0, 2, killed=met, ended_by=(137,))
        if met:
            os.remove(log)
        return outcome if met or outcome.result == VIOLATION else Outcome(UNREACHED, spec)

    def rank_stopped(self, draw, name, early=False):
        begin = time.monotonic()
        log = os.path.join(self.bench.folder, name + ".log")
        job = self.bench.start(name, ranks=2, env={"CERTKV_FAILPOINT": SLOW,
                                                   "CERTKV_FAILPOINT_LOG": log})
        store = self.store_of(job)
        while not early and not jobs.fired(log) and job.process.poll() is None:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.06 if early else 0.3))
        ranks = sorted(set(job.pids("certkv")) - {store})
        reached = len(ranks) == 2 and kill(ranks[draw.randrange(2)], signal.SIGSTOP)
        pause = draw.choice((0.1, 0.5, 60))
        if pause < 1:
            time.sleep(pause)
            for pid in ranks:
                kill(pid, signal.SIGCONT)
        outcome = self.ends(job, name, begin, min(pause, 1), 2)
        return outcome if reached or outcome.result == VIOLATION else Outcome(UNREACHED, "too late")

    def rank_stopped_early(self, draw, name):
        """While models are loaded: work may stand still for minutes then, a process may not."""
        return self.rank_stopped(draw, name, early=True)

    def disk_full(self, draw, name):
        """No file may grow beyond a size; the audit and the journal are the first to meet it."""
        size = draw.choice((0, draw.randrange(4096), draw.randrange(200_000),
                            draw.randrange(4_000_000)))
        begin = time.monotonic()
        # The store's arena is a file too, and is refused by name.
        job = self.bench.start(name, wrap=("prlimit", f"--fsize={size}"))
        return self.ends(job, name, begin)

    def file_system_full(self, draw, name):
        """The results' own file system has little room; --resume finds more."""
        if os.geteuid() != 0:
            return Outcome(UNREACHED, "only root can mount a file system")
        folder = os.path.join(self.bench.folder, name)
        os.makedirs(folder)
        mount = subprocess.run(["mount", "-t", "tmpfs", "-o",
                                f"size={draw.choice((4, 16, 64, 400, 1000, 2600, 16000))}k", "faults", folder],
                               capture_output=True, text=True, timeout=20, check=False)
        if mount.returncode != 0:
            return Outcome(UNREACHED, mount.stderr.strip())
        try:
            begin = time.monotonic()
            job = self.bench.start(name)
            limit = self.bench.job_seconds + 4 * jobs.DEADLINE_S + jobs.GRACE_S
            outcome = self.bench.judge(job, name, limit, jobs.ended_after(job, begin, limit + 20))
            subprocess.run(["mount", "-o", "remount,size=64m", folder], timeout=20, check=True)
            wrong = self.bench.resume(name) if outcome.result == NAMED else None
            return Outcome(VIOLATION, f"{outcome.text}; {wrong}") if wrong else outcome
        finally:
            subprocess.run(["umount", "-l", folder], timeout=20, check=True)
            self.bench.drop(name)

    def memory_refused(self, draw, name):
        size = draw.randrange(270, 700) << 20  # with less OpenBLAS hangs before main()
        begin = time.monotonic()
        job = self.bench.start(name, wrap=("prlimit", f"--as={size}"))
        return self.ends(job, name, begin)

    def clock_jump(self, draw, name):
        if not self.clock_shim:
            return Outcome(UNREACHED, "the shim is not built")
        env = {"LD_PRELOAD": self.clock_shim,
               "CERTKV_CLOCK_JUMP": str(draw.choice((3600, 86400 * 400, 10**9)))}
        begin = time.monotonic()
        job = self.bench.start(name, env=env, ranks=draw.choice((0, 2)))
        outcome = self.ends(job, name, begin)
        if outcome.result == NAMED:
            return Outcome(VIOLATION, f"a clock that jumps ended the job: {outcome.text}")
        return outcome

    def second_uid(self, draw, name):
        """Another user at everything that a running job has."""
        if os.geteuid() != 0:
            return Outcome(UNREACHED, "only root can become another user")
        begin = time.monotonic()
        job = self.bench.start(name, env={"CERTKV_FAILPOINT": SLOW})
        store = self.store_of(job)
        got = intrude(job, store, os.path.join(self.bench.folder, name)) if store else None
        outcome = self.ends(job, name, begin)
        if got:
            return Outcome(VIOLATION, f"another user got at {got}")
        return outcome if store or outcome.result == VIOLATION else Outcome(UNREACHED, "too late")

    def retry_storm(self, draw, name):
        """A store that is killed again and again; the job goes on with --resume."""
        for attempt in range(draw.randrange(2, 5)):
            job = self.bench.start(name, "--resume", env={"CERTKV_FAILPOINT": SLOW})
            store = self.store_of(job)
            time.sleep(draw.uniform(0, 0.3))
            kill(store, signal.SIGKILL)
            job.wait(30)
            if job.timed_out:
                return Outcome(VIOLATION, f"hangs in attempt {attempt}")
            if job.exit_code == 0:
                break
        wrong = self.bench.resume(name)
        self.bench.drop(name)
        return Outcome(VIOLATION, wrong) if wrong else Outcome(SAME)

    def batch_lines(self, draw, name):
        """Lines of another author beside a good one: they fail by name, and the good one does not."""
        with open(os.path.join(self.bench.folder, "batch.jsonl"), encoding="utf-8") as file:
            good = file.read().splitlines()
        bad = []
        for _ in range(draw.randrange(1, 6)):
            text = list(draw.choice(good)[:draw.randrange(20, 400)])
            for _ in range(draw.randrange(1, 8)):
                text.insert(draw.randrange(len(text)),
                            draw.choice(('"', "{", "]", "\\", "\x00", "9" * 30, "[" * 90, "\ud7ff")))
            bad.append("".join(text).replace("\n", " "))
        lines = good + bad
        draw.shuffle(lines)
        path = os.path.join(self.bench.folder, name + ".jsonl")
        with open(path, "w", encoding="utf-8", errors="replace") as file:
            file.write("\n".join(lines) + "\n")
        arguments = self.bench.arguments(name)
        arguments[arguments.index("--input") + 1] = path
        job = harness.run(product.command(arguments), timeout_s=60)
        answered = [line for line in product.lines(self.bench.folder, name, "results.jsonl")
                    if not line["error"]] if job.exit_code in (0, 3) else []
        texts = [line["response"]["body"]["choices"][0]["text"] for line in answered]
        os.remove(path)
        self.bench.drop(name)
        if job.timed_out or job.exit_code not in (0, 2, 3):
            return Outcome(VIOLATION, f"ended with {job.exit_code}: {job.stderr[-300:]}")
        if job.exit_code == 2:
            return Outcome(NAMED, job.stderr.strip()[-200:])
        if not set(self.bench.answers.values()) <= set(texts):
            return Outcome(VIOLATION, f"the good line is answered {texts}")
        return Outcome(SAME)

    def failpoint(self, draw, name):
        point, actions = draw.choice(self.points)
        action = draw.choice(actions)
        spec, pause = failpoints.specification(point, action, draw.randrange(1 << 30),
                                               draw.random() < 0.3)
        needs = dict(failpoints.NEEDS.get(point, {}))
        needs.setdefault("ranks", draw.choice((0, 0, 0, 2)) if "again" not in needs else 0)
        return jobs.run_failpoint(self.bench, point, spec, pause_s=pause, **needs)


def kill(pid, number):
    """False where there is no such process any more."""
    try:
        return pid > 0 and (os.kill(pid, number) or True)
    except ProcessLookupError:
        return False


INTRUDER = r"""
import os, socket, sys
store, job, folder, address = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
os.setgroups([]); os.setgid(65534); os.setuid(65534)
got = []
s = socket.socket(socket.AF_UNIX)
s.settimeout(3)
try:
    s.connect("\0" + address[1:] if address[0] == "@" else address)
    s.sendall(bytes.fromhex(sys.argv[5]))
    if s.recv(4096): got.append("an answer of the store")
except OSError: pass
for pid in (store, job):
    for what in ("mem", "environ", "maps"):
        try:
            with open(f"/proc/{pid}/{what}", "rb") as file:
                if what == "mem" or file.read(1): got.append(f"/proc/{pid}/{what}")
        except OSError: pass
    for fd in range(64):  # the arena's file is one of the first
        try:
            where = os.readlink(f"/proc/{pid}/fd/{fd}")
            os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR); got.append(f"/proc/{pid}/fd/{fd} {where}")
        except OSError: pass
    try:
        os.kill(pid, 0); got.append(f"signals to {pid}")
    except OSError: pass
for name in os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else ():
    if not name.startswith(("certkv", "vader", "ucx", "psm", "mpi")): continue
    try:
        os.open("/dev/shm/" + name, os.O_RDWR); got.append("/dev/shm/" + name)
    except OSError: pass
for where, _, names in os.walk(folder):
    for name in names:
        try:
            os.open(os.path.join(where, name), os.O_RDWR); got.append(os.path.join(where, name))
        except OSError: pass
print("\n".join(got))
"""


def intrude(job, store, folder, program=INTRUDER):
    """What another user gets at: objects, one a line; empty: nothing."""
    address = next(word for word in job.stderr.split() if word.startswith(("@certkv-", "/")))
    # A header of an attach request; whether its checksum is right no stranger gets to learn.
    attach = "434b5643" "0100" "0100" "08000000" "00000000" "0100000000000000" + "00" * 24
    run = subprocess.run([sys.executable, "-c", program, str(store), str(job.process.pid), folder,
                          address, attach], capture_output=True, text=True, timeout=30, check=True)
    return run.stdout.strip()


# name -> (row of the fault model, what is injected, share among the processes' injections)
TABLE = {
    "store_killed": (1, "the store is killed", 0.14),
    "rank_killed": (12, "a rank is killed in the middle of a step", 0.14),
    "rank_stopped": (13, "a rank is stopped for a while, or for ever", 0.08),
    "rank_stopped_early": (13, "a rank is stopped before the first step", 0.05),
    "store_stopped": (13, "the store is stopped for a while, or for ever", 0.06),
    "memory_refused": (8, "address space that ends somewhere", 0.07),
    "batch_lines": (16, "lines of an attacker in the batch", 0.1),
    "second_uid": (19, "another user at socket, memory, files", 0.04),
    "clock_jump": (22, "a wall clock that jumps", 0.05),
    "disk_full": (23, "files that may not grow", 0.06),
    "file_system_full": (23, "a file system without room", 0.06),
    "retry_storm": (24, "a store that is killed again and again", 0.05),
    "failpoint": (0, "any failpoint, in the whole program", 0.17),
}


def run(rows, row, seed):
    draw = random.Random(f"{row} {seed}")
    begin = time.monotonic()
    try:
        outcome = getattr(rows, row)(draw, f"{row} {seed}")
    except (AssertionError, OSError, ValueError, StopIteration, subprocess.SubprocessError,
            json.JSONDecodeError) as error:
        outcome = Outcome(VIOLATION, f"{type(error).__name__}: {str(error)[-800:]}")
    return {"row": row, "seed": seed, "result": outcome.result, "late": outcome.late,
            "seconds": time.monotonic() - begin, "text": outcome.text[:1200]}
