"""Every failpoint, and how a job is brought to meet it."""

from jobs import product

KINDS = ("IoError", "OutOfMemory", "Corrupt", "CommError", "StoreLost", "DeadlineExceeded")
SHORT_MS, LONG_MS = 40, 1700  # within D, and well beyond it
DISABLES = {"reader.undigested", "tier.unchecked"}  # defences: see campaign_test.py
SLOW = "engine.decode=sleep:120"  # so that the store meets heartbeats
# name -> what run_failpoint needs beside it
NEEDS = {
    "holder.heartbeat": {"helpers": SLOW},
    "holder.orphan": {"helpers": "engine.sample=panic,skip=1"},
    "reader.undigested": {"helpers": "reader.source=corrupt,probability=0.02"},
    "tier.unchecked": {"helpers": "tier.rot=corrupt"},
    "journal.read": {"again": True},
    "ranks.beat": {"ranks": 2},
    "ranks.wait": {"ranks": 2},
}
# Met once at most: a panic there leaves nothing to skip to.
FIRST = ("store.", "arena.", "output.", "model.", "safetensors.", "client.connect", "client.attach")


def table():
    """[(name, [action..])] as the program lists them."""
    job = product.certkv("doctor", "--failpoints").expect_exit(0)
    return [(name, actions.split()) for name, actions, _ in
            (line.split("\t") for line in job.stdout.splitlines())]


def specification(name, action, draw, long_sleep=False, skip=None):
    """(text of CERTKV_FAILPOINT, seconds it sleeps). draw: a number that decides what is open."""
    pause = 0
    if action == "error":
        action = "error:" + KINDS[draw % len(KINDS)]
    if action == "sleep":
        pause = LONG_MS if long_sleep else SHORT_MS
        action = f"sleep:{pause},count=1"
    if name.startswith(("tier.", "scratch.")) and action != "force":
        action += ",count=1"  # what is made anew in its place is whole
    if skip is None:
        skip = 0 if name.startswith(FIRST) else draw // 7 % 3
    return f"{name}={action},skip={skip},seed={draw}", pause / 1000
