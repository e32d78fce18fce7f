"""Runs a command, alone or under mpirun, and sees what it left behind. Python's standard library only.

    job = harness.run(["build/bin/certkv", "run", "--config", "x.yaml"], ranks=2, timeout_s=60)
    job.expect_exit(0)
    job.expect_nothing_left()

A run gets a mark of its own in the environment, which its descendants inherit: a process that
carries the mark after the command has ended is a leftover, whatever session or parent it has. What
appeared in /dev/shm since the start, belongs to this user and is not in use by the living processes
of somebody else (a test beside this one) is a leftover too.
"""

import os
import secrets
import signal
import subprocess
import tempfile
import threading
import time

MARK = "CERTKV_TEST_RUN"
SHM = "/dev/shm"
OTHER_TESTS = ("certkv-fault.",)  # folders that another test keeps there, in use or not


class Job:
    """A command, running or ended. Create it with start() or run()."""

    def __init__(self, command, ranks, env, cwd, mpi_options):
        self.mark = secrets.token_hex(8)
        self.command = mpirun(ranks, mpi_options) + list(command) if ranks else list(command)
        self.exit_code = None
        self.timed_out = False
        self._shm_before = shm_entries()
        self._output = {"stdout": b"", "stderr": b""}
        environment = {**os.environ, **(env or {}), MARK: self.mark}
        if os.geteuid() == 0:  # Open MPI refuses to run as root unless told twice
            environment["OMPI_ALLOW_RUN_AS_ROOT"] = "1"
            environment["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
        self.process = subprocess.Popen(self.command, env=environment, cwd=cwd,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, start_new_session=True)
        self._readers = [threading.Thread(target=self._read, args=(name,), daemon=True)
                         for name in self._output]
        for reader in self._readers:
            reader.start()

    def _read(self, name):
        pipe = getattr(self.process, name)
        while chunk := os.read(pipe.fileno(), 65536):
            self._output[name] += chunk

    @property
    def stdout(self):
        return self._output["stdout"].decode("utf-8", "replace")

    @property
    def stderr(self):
        return self._output["stderr"].decode("utf-8", "replace")

    def pids(self, name=None):
        """The living processes of this run, optionally only those whose program is called `name`."""
        return [pid for pid, program in marked_processes(self.mark) if name in (None, program)]

    def wait_for(self, condition, timeout_s, what):
        """Polls until condition() is true; fails if the run ends or the time is over first."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.process.poll() is not None and not condition():
                self._fail(f"ended with {self.process.returncode} before {what}")
            if time.monotonic() > deadline:
                self._fail(f"{what} did not happen within {timeout_s} s")
            time.sleep(0.02)

    def signal(self, number, pid=None):
        os.kill(self.process.pid if pid is None else pid, number)

    def wait(self, timeout_s):
        """Waits for the end; past the time everything of the run is killed, and timed_out is set."""
        try:
            self.exit_code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.timed_out = True
            self.kill()
            self.exit_code = self.process.wait(30)
        for reader in self._readers:
            reader.join(5)  # a leftover may hold the pipe open: what came so far is kept
        for reader, pipe in zip(self._readers, (self.process.stdout, self.process.stderr)):
            if not reader.is_alive():
                pipe.close()
        return self

    def kill(self):
        """Ends every process of this run, and of no other."""
        for pid in self.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def leftovers(self, grace_s=5.0):
        """(processes, shm entries) that are still there after the grace; empty lists if none."""
        deadline = time.monotonic() + grace_s
        while True:
            processes = marked_processes(self.mark)
            shm = shm_entries() - self._shm_before
            shm = sorted(shm - in_use_by_others(self.mark)) if shm else []
            if not (processes or shm) or time.monotonic() > deadline:
                return processes, shm
            time.sleep(0.05)

    def expect_exit(self, *codes):
        if self.timed_out or self.exit_code not in codes:
            wanted = " or ".join(map(str, codes))
            how = "timed out" if self.timed_out else f"ended with {self.exit_code}"
            self._fail(f"{how}, expected {wanted}")
        return self

    def expect_text(self, *texts):
        """Each text stands in standard output or standard error."""
        for text in texts:
            if text not in self.stdout and text not in self.stderr:
                self._fail(f"did not say '{text}'")
        return self

    def expect_nothing_left(self, grace_s=5.0):
        processes, shm = self.leftovers(grace_s)
        if processes or shm:
            self.kill()
            self._fail(f"left processes {processes} and {SHM} entries {shm}")
        return self

    def _fail(self, what):
        raise AssertionError(f"{' '.join(self.command)}: {what}\n--- standard output\n"
                             f"{self.stdout[-4000:]}\n--- standard error\n{self.stderr[-4000:]}")


def mpirun(ranks, options=()):
    return ["mpirun", "-np", str(ranks), "--oversubscribe", "--bind-to", "none", *options]


def start(command, ranks=0, env=None, cwd=None, mpi_options=()):
    return Job(command, ranks, env, cwd, mpi_options)


def run(command, ranks=0, timeout_s=60, env=None, cwd=None, mpi_options=()):
    return start(command, ranks, env, cwd, mpi_options).wait(timeout_s)


def marked_processes(mark):
    """(pid, program) of every living process whose environment carries the mark."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if wanted not in file.read().split(b"\0"):
                    continue
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                program, rest = file.read().split("(", 1)[1].rsplit(")", 1)
            if rest.split()[0] not in "ZX":
                found.append((int(pid), program))
        except (FileNotFoundError, ProcessLookupError, PermissionError, IndexError):
            continue  # it ended meanwhile, or is another user's
    return found


def shm_entries():
    """The names in /dev/shm that belong to this user."""
    found = set()
    for entry in os.scandir(SHM) if os.path.isdir(SHM) else ():
        try:
            if (entry.stat(follow_symlinks=False).st_uid == os.geteuid()
                    and not entry.name.startswith(OTHER_TESTS)):
                found.add(entry.name)
        except FileNotFoundError:
            continue
    return found


def in_use_by_others(mark):
    """The names in /dev/shm that a process without the mark has mapped or opened."""
    ours, found = {pid for pid, _ in marked_processes(mark)}, set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if int(pid) in ours:
            continue
        try:
            with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as file:
                used = {line.split(None, 5)[5].strip() for line in file if f" {SHM}/" in line}
            used |= {os.readlink(fd.path) for fd in os.scandir(f"/proc/{pid}/fd")}
        except OSError:
            continue  # it ended meanwhile, or is another user's
        found |= {name[len(SHM) + 1:] for name in used if name.startswith(SHM + "/")}
    return found


def temporary_folder():
    """A folder with a space in its name, removed at the end of the `with` block."""
    return tempfile.TemporaryDirectory(prefix="certkv e2e ")
