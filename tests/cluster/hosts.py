"""Hosts as network namespaces of this machine, with a switch between them. Root only; Python's
standard library and iproute2.

    with Cluster(2) as cluster:
        job = cluster.start([program, "run", ..], ranks=2)   # mpirun on the first host

Every host has one interface, eth0, with 10.77.0.N; its other end lies in a namespace that plays the
switch: a kernel bridge, or the seeded wire of wire.py. They share the machine's name and files, so
which node a process is on is told by CERTKV_NODE (parallel/topology.h), which the agent that mpirun
uses in ssh's place sets (agent.sh), beside a folder for temporary files: the daemons of two hosts of
one name would share theirs.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "e2e"))
import harness  # noqa: E402

NETWORK = "10.77.0"
# mpirun and its daemons wait for a host that no longer answers until TCP gives up, a quarter of an
# hour by default; four retries are some seconds. Ranks and stores go by their own deadlines.
RETRIES = 4


def ip(*words, check=True):
    return subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20, check=check)


def why_not():
    """Why hosts cannot be had on this machine; None where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"ckv-try-{secrets.token_hex(3)}"
    try:
        made = ip("netns", "add", name, check=False)
        if made.returncode != 0:
            return f"ip netns add: {made.stderr.strip()}"
        pair = ip("-n", name, "link", "add", "try0", "type", "veth", "peer", "name",
                  "try1", check=False)
        bridge = ip("-n", name, "link", "add", "try2", "type", "bridge", check=False)
        ip("netns", "del", name, check=False)
    except OSError as error:
        return f"ip: {error}"
    for tried in (pair, bridge):
        if tried.returncode != 0:
            return f"ip link add: {tried.stderr.strip()}"
    return None


class Cluster:
    """wire: None for a kernel bridge, or the options of wire.py."""

    def __init__(self, hosts, wire=None):
        self.tag = secrets.token_hex(3)
        self.switch = f"ckv-{self.tag}-switch"
        self.hosts = [f"ckv-{self.tag}-{n}" for n in range(hosts)]
        self.wire_options = wire
        self.folder = tempfile.TemporaryDirectory(prefix="certkv hosts ")
        self.wire = None
        self.wire_did = {}  # once closed

    def __enter__(self):
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_):
        self.close()

    def _make(self):
        ip("netns", "add", self.switch)
        if self.wire_options is None:
            ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
            ip("-n", self.switch, "link", "set", "br0", "up")
        for n, host in enumerate(self.hosts):
            os.mkdir(os.path.join(self.folder.name, host))
            ip("netns", "add", host)
            ip("-n", self.switch, "link", "add", f"port{n}", "type", "veth", "peer", "name", "eth0",
               "netns", host)
            ip("-n", host, "link", "set", "lo", "up")
            ip("-n", host, "addr", "add", f"{NETWORK}.{n + 1}/24", "dev", "eth0")
            ip("-n", host, "link", "set", "eth0", "up")
            ip("-n", self.switch, "link", "set", f"port{n}", "up")
            if self.wire_options is None:
                ip("-n", self.switch, "link", "set", f"port{n}", "master", "br0")
            self.inside(n, "sh", "-c", f"echo {RETRIES} >/proc/sys/net/ipv4/tcp_retries2")
        if self.wire_options is not None:
            for n in range(len(self.hosts)):
                off = self.inside(n, sys.executable, os.path.join(HERE, "wire.py"), "--offload-off",
                                  "eth0")
                assert off.returncode == 0, off.stderr
            self.wire = subprocess.Popen(
                ["ip", "netns", "exec", self.switch, sys.executable, os.path.join(HERE, "wire.py"),
                 *map(str, self.wire_options), *(f"port{n}" for n in range(len(self.hosts)))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert self.wire.stdout.readline() == "ready\n", "the wire does not start"

    def close(self):
        if self.wire is not None:
            self.wire.stdin.close()
            try:
                self.wire_did = json.loads(self.wire.stdout.readline() or "{}")
                self.wire.wait(5)
            except subprocess.TimeoutExpired:
                self.wire.kill()
                self.wire.wait()
            self.wire.stdout.close()
            self.wire = None
        for space in (*self.hosts, self.switch):
            for pid in self.pids(space):
                os.kill(pid, signal.SIGKILL)
            ip("netns", "del", space, check=False)
        self.folder.cleanup()

    @staticmethod
    def pids(space):
        return [int(pid) for pid in ip("netns", "pids", space, check=False).stdout.split()]

    def kill_host(self, n):
        """Every process of a host at once."""
        for pid in self.pids(self.hosts[n]):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def cut(self, n):
        """No frame reaches or leaves host n any more."""
        ip("-n", self.switch, "link", "set", f"port{n}", "down")

    def mend(self, n):
        ip("-n", self.switch, "link", "set", f"port{n}", "up")

    def tell_wire(self, line):
        """Changes the wire: see wire.py."""
        self.wire.stdin.write(line + "\n")
        self.wire.stdin.flush()

    def inside(self, n, *command, **options):
        return subprocess.run(["ip", "netns", "exec", self.hosts[n], *command], text=True,
                              capture_output=True, timeout=30, check=False, **options)

    def start(self, command, ranks, env=None, options=()):
        """mpirun on the first host, ranks dealt to the hosts in turn."""
        each = -(-ranks // len(self.hosts))
        return harness.start(
            ["ip", "netns", "exec", self.hosts[0],
             *harness.mpirun(ranks, ("--host", ",".join(f"{h}:{each}" for h in self.hosts),
                                     "--map-by", "node", "--mca", "plm_rsh_agent",
                                     os.path.join(HERE, "agent.sh"),
                                     "--mca", "oob_tcp_if_include", f"{NETWORK}.0/24",
                                     "--mca", "pml", "ob1", "--mca", "btl", "tcp,self",
                                     "--mca", "btl_tcp_if_include", f"{NETWORK}.0/24", *options)),
             *command], env={**(env or {}), "CERTKV_HOSTS_TMP": self.folder.name})
