"""One end-to-end job with one fault, and what came of it. Python's standard library only.

The oracle is the same job without a fault: an answer is right if its text is the fault-free one's,
and a certificate if `certkv verify`, which recomputes bound and true error in float64, says so.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "e2e"))
import harness  # noqa: E402
import product  # noqa: E402

SAME, NAMED, VIOLATION, UNREACHED = "same answer", "named error", "violation", "not reached"
DEADLINE_S = 1.0   # parallel.deadline_seconds and store.deadline_seconds of these jobs
LEFT_S = 13.0      # a store that no rank attaches to ends itself after 10 s (attach_within)
GRACE_S = 6.0      # beyond fault, D and the fault-free job's time: a loaded machine's
STORE = re.compile(r"store of this node: process (\d+)")
ERROR = re.compile(r"certkv: error|\]\[error\]|is lost")


class Outcome:
    """result: SAME, NAMED, VIOLATION or UNREACHED; text: what was said, or what is wrong."""

    def __init__(self, result, text="", seconds=0.0, late=False):
        self.result, self.text, self.seconds, self.late = result, text, seconds, late

    def __repr__(self):
        return f"{self.result} in {self.seconds:.2f} s: {self.text}"


class Bench:
    """A demo batch, its fault-free answers, and a folder for jobs."""

    def __init__(self, program, reader, contexts=(512,), questions=1, extra=()):
        product.PROGRAM, product.READER = os.path.abspath(program), os.path.abspath(reader)
        self.temporary = tempfile.TemporaryDirectory(prefix="certkv faults ")
        self.folder = self.temporary.name
        self.extra = list(extra)
        product.demo_batch(self.folder, "reader", list(contexts), questions)
        begin = time.monotonic()
        whole = self.start("whole").wait(100).expect_exit(0)
        self.job_seconds = time.monotonic() - begin
        self.answers = product.texts(self.folder, "whole", "results.jsonl")
        assert self.answers and all(self.answers.values()), whole.stderr
        self.check_certificates("whole")

    def close(self):
        self.temporary.cleanup()

    def arguments(self, name, *more, model=None):
        return product.job_arguments(
            self.folder, name, "--parallel.deadline_seconds", DEADLINE_S, "--store.deadline_seconds",
            DEADLINE_S, "--store.linger_seconds", 0.2, "--audit.sample", "1.0", *self.extra, *more,
            model=model)

    def start(self, name, *more, ranks=0, env=None, model=None, wrap=(), **options):
        command = [*wrap, *product.command(self.arguments(name, *more, model=model))]
        job = harness.start(command, ranks=ranks, env=env, **options)
        job.ranks = ranks
        return job

    def check_certificates(self, name):
        """None, or what `certkv verify` finds wrong with a job's audit."""
        audit = os.path.join(self.folder, name, "audit")
        if not os.path.isdir(audit) or not os.listdir(audit):
            return "there is no audit"
        job = product.certkv("verify", audit, "--allow-truncated", timeout_s=60)
        if job.exit_code == 0 and " 0 violations" in job.stdout:
            return None
        return f"verify ended with {job.exit_code}: {(job.stdout + job.stderr)[-600:]}"

    def judge_answers(self, name):
        """(right, failed by name, what is wrong or None) of a results file."""
        path = os.path.join(self.folder, name, "results.jsonl")
        right, failed = 0, 0
        for line in product.lines(path) if os.path.exists(path) else ():
            key = line["custom_id"]
            if line["error"]:
                if not line["error"].get("code") or not line["error"].get("message"):
                    return right, failed, f"{key} failed without a name: {line['error']}"
                failed += 1
            elif line["response"]["body"]["choices"][0]["text"] == self.answers.get(key):
                right += 1
            else:
                return right, failed, (f"{key} is answered "
                                       f"{line['response']['body']['choices'][0]['text']!r}, not "
                                       f"{self.answers.get(key)!r}")
        return right, failed, None

    def judge(self, job, name, limit_s, seconds, killed=(), ended_by=()):
        """What a job that has ended says. killed: its processes that the fault has killed;
        ended_by: exit codes of whoever was told to end."""
        said = [line for line in job.stderr.splitlines() if ERROR.search(line)]
        text = said[-1][:300] if said else ""
        late = seconds > limit_s
        right, failed, wrong = self.judge_answers(name)
        processes, shm = job.leftovers(LEFT_S)
        job.kill()

        def violation(what):
            return Outcome(VIOLATION, f"{what}; it said: {job.stderr[-500:]}", seconds, late)
        if job.timed_out:
            return violation(f"hangs beyond {limit_s:.1f} s")
        if processes or shm:
            return violation(f"left processes {processes}, {harness.SHM} {shm}")
        if wrong:
            return violation(wrong)
        code = job.exit_code
        if code == 0:
            if right != len(self.answers):
                return violation(f"success with {right} of {len(self.answers)} answers")
            wrong = self.check_certificates(name)
            return violation(wrong) if wrong else Outcome(SAME, text, seconds, late)
        if code == 3 and right + failed == len(self.answers) and failed > 0:
            return Outcome(NAMED, text or "failed lines", seconds, late)
        if code in (-signal.SIGKILL, 128 + signal.SIGKILL) and killed:
            return Outcome(NAMED, text or "killed, as asked", seconds, late)
        # Of ranks that end at once mpirun may name any one's end, MPI_Abort's own (134) included.
        if (code in (1, 2, 4, *ended_by) or job.ranks and code in (134, 137)) and text:
            return Outcome(NAMED, text, seconds, late)
        return violation(f"ended with {code}, without an error's name")

    def resume(self, name, ranks=0):
        """Goes on without a fault; None, or what is wrong with the end."""
        job = self.start(name, "--resume", ranks=ranks).wait(60)
        right, failed, wrong = self.judge_answers(name)
        processes, shm = job.leftovers(LEFT_S)
        job.kill()
        if wrong:
            return f"after --resume {wrong}"
        if job.exit_code == 3 and failed and right + failed == len(self.answers):
            return None  # lines that failed by name stay failed
        if job.exit_code != 0 or right != len(self.answers):
            return f"--resume ended with {job.exit_code}: {job.stderr[-500:]}"
        if processes or shm:
            return f"--resume left processes {processes}, {harness.SHM} {shm}"
        return None

    def drop(self, name):
        shutil.rmtree(os.path.join(self.folder, name), ignore_errors=True)


def ended_after(job, begin, limit_s):
    """Waits; the seconds until the command itself has ended (its store may live a little longer)."""
    try:
        job.process.wait(limit_s)
    except subprocess.TimeoutExpired:
        pass
    seconds = time.monotonic() - begin
    job.wait(0.01)
    return seconds


def fired(path):
    """[(name, pid)] of the faults that happened, as the processes wrote them down."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [(name, int(pid)) for name, pid in (line.split() for line in file)]


def run_failpoint(bench, name, spec, ranks=0, pause_s=0.0, again=False, helpers=""):
    """A job under `spec` of one failpoint. again: the fault is met by --resume of a finished job.
    helpers: other failpoints that bring it about."""
    job_name = "job " + re.sub(r"[^a-z0-9]+", "-", f"{spec}-{ranks}-{again}".lower())
    log = os.path.join(bench.folder, job_name + ".log")
    env = {"CERTKV_FAILPOINT": spec + (";" + helpers if helpers else ""),
           "CERTKV_FAILPOINT_LOG": log}
    more = []
    if again:
        bench.start(job_name).wait(60).expect_exit(0)
        more = ["--resume"]
    limit = bench.job_seconds + pause_s + 4 * DEADLINE_S + GRACE_S
    begin = time.monotonic()
    job = bench.start(job_name, *more, ranks=ranks, env=env)
    seconds = ended_after(job, begin, limit + 20)
    job.leftovers(LEFT_S)  # what the store meets after the job counts too
    met = [pid for point, pid in fired(log) if point == name]
    panics = any("=panic" in s for s in env["CERTKV_FAILPOINT"].split(";"))
    outcome = bench.judge(job, job_name, limit, seconds, killed=fired(log) if panics else ())
    if outcome.result != VIOLATION and not met:
        outcome = Outcome(UNREACHED, f"{spec} was never met", seconds)
    if outcome.result == NAMED:
        wrong = bench.resume(job_name)
        if wrong:
            outcome = Outcome(VIOLATION, f"{outcome.text}; {wrong}", seconds)
    bench.drop(job_name)
    if os.path.exists(log):
        os.remove(log)
    return outcome
