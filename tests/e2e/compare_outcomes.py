#!/usr/bin/env python3
"""Compares two audited runs head-step by head-step, such as the CPU backend's and a device's.

    compare_outcomes.py RUN_A RUN_B

Both are output folders of `certkv run` with the same input, policies and tolerances and
--audit.sample 1; the number of ranks may differ. Head-steps are matched by request, policy, context
length, layer and query head. Every one whose outcome or rung differs is listed with both bounds, the
tolerance and the class of its difference (UNITS of bounds: those of the tolerance):

  straddle      one bound of the speculative pass lies within the tolerance and one beyond, and they
                differ by no more than rounding() derives
  originals     the bounds lie on two sides too, by more; but the passes, or those of an earlier step,
                did not read the same blocks from originals: what a ladder promotes stays
  ladder order  both climbed, to different rungs, and kept what the policy promises. A device chooses
                for a KV head, in bins, all or nothing (kernels/cuda/DESIGN.md, 3), and allows a round
                ladder.max_share for each of its failing heads, together; the CPU holds each head to
                its own share over all rounds. So either goes to rung 3 where the other need not
  rounding      one went to rung 3, and even over originals its bound, which is rounding alone, is
                beyond the tolerance: no promotion could have done. A device charges originals more
                than the CPU does (24 u for a matrix instruction, kernels/METHOD.md, 12b)
  unexplained   anything else

A request is compared up to its first token that differs, which is said. Exit code 0: nothing
unexplained; 1: something is; 2: the runs cannot be compared. runtime/AUDIT.md is the format.
"""

import collections
import glob
import json
import os
import struct
import sys

REDRAWN_NORM = 6 / 180**0.5  # both: see rounding()
HALVES_AND_CLOSING = 15 / 2**11 + 2 * 2**-10


def rounding(head_dim):
    """How far two backends may state the same bound apart, as a share of it.

    Keys: products in another order round some elements of K to the neighbouring 16-bit number, which
    moves it by a good part of a step of the codes: its quantisation error is drawn anew. e_b of D1 is
    a norm of head_dim such errors. Each is uniform over a step, so the sum of squares is d / 12 with a
    standard deviation of sqrt(d / 180), and its root's share of itself is half of that: 6 / sqrt(180
    d), 5.6 % at 64. That much is allowed, since a bound averages over blocks; where one block is all,
    a difference can be honest and larger, and has to be looked at.
    Values (kernels/METHOD.md, 12b): as halves they move by 2^-11 of themselves, beside half a step in
    15 of the range; 15 / 2^11 for one of half the range. The closing of E4 and S_lo: 2^-10 each.
    Seen at 64, reader, policy naive, bounds within 0.02 and 0.1: 5.6 % at most."""
    return REDRAWN_NORM / head_dim**0.5 + HALVES_AND_CLOSING


SIDE = 2**-10  # S_lo, which decides, beside S, to which `relative` is recorded
# Rows of layer 0 depend on token and position alone: those of the same token differ by the rounding
# of the product that made them and of BF16 (2^-8), those of two tokens by their size.
SAME_TOKEN = 2**-5

OUTCOMES = ("certified", "exact", "failed", "over")  # kernels/arith/verdict.h
KEPT = {"budget": {"certified", "exact"}, "dense": {"exact"},
        "paper": {"certified", "exact", "over"}, "naive": {"certified", "over"}}
HEADER, PROMPT, SEQUENCE, ROWS, RECORD = 1, 2, 3, 4, 5

HeadStep = collections.namedtuple("HeadStep", "outcome rung bound candidate promoted used")


class Unusable(Exception):
    pass


def floats_of(dtype, data):
    """16-bit numbers as floats."""
    if dtype.lower() in ("f16", "float16"):
        return struct.unpack(f"<{len(data) // 2}e", data)
    wide = bytearray(2 * len(data))
    wide[2::4], wide[3::4] = data[0::2], data[1::2]
    return struct.unpack(f"<{len(data) // 2}f", bytes(wide))


def links(path):
    """(kind, payload) of every link; the digests are `certkv verify`'s to check."""
    with open(path, "rb") as file:
        if file.read(8) != b"CKVAUDIT":
            raise Unusable(f"{path}: not an audit file")
        while head := file.read(16):
            if len(head) < 16:
                raise Unusable(f"{path}: cut within a link")
            kind, _, size = struct.unpack("<IIQ", head)
            payload = file.read(size)
            if len(payload) < size or len(file.read(32)) < 32:
                raise Unusable(f"{path}: cut within a link")
            yield kind, payload


class Run:
    """steps: (request, policy) -> {tokens -> {(layer, query head) -> HeadStep}};
    values: (request, policy) -> {row -> the values of layer 0, KV head 0}."""

    def __init__(self, folder):
        self.folder = folder
        self.steps = collections.defaultdict(lambda: collections.defaultdict(dict))
        self.values = collections.defaultdict(dict)
        self.tolerances = {}
        self.head_dim = None
        self.group = None  # query heads of a KV head
        paths = sorted(glob.glob(os.path.join(glob.escape(folder), "audit", "*.audit")))
        if not paths:
            raise Unusable(f"{folder}: no audit files; run with --audit.sample 1")
        for path in paths:
            self.read(path)

    def read(self, path):
        streams, header = {}, None
        for kind, payload in links(path):
            if kind == HEADER:
                header = json.loads(payload)
                if header["sample"] != 1:
                    raise Unusable(f"{path}: {header['sample']} of the head-steps; run with "
                                   "--audit.sample 1")
                self.head_dim = header["model"]["head_dim"]
                self.group = header["model"]["query_heads"] // header["model"]["kv_heads"]
            elif kind == SEQUENCE:
                s = json.loads(payload)
                streams[s["stream"]] = key = (s["request"], s["policy"])
                (unit, value), = s["tolerance"].items()
                self.tolerances[key] = (unit, value)
            elif kind == ROWS:
                self.add_rows(streams, header, payload)
            elif kind == RECORD:
                self.add_record(streams, header["model"]["head_dim"], payload)

    def add_rows(self, streams, header, payload):
        stream, layer, kv_head, rows, first = struct.unpack_from("<IIIIQ", payload)
        if stream not in streams or layer != 0 or kv_head != 0:
            return
        size = 2 * header["model"]["head_dim"]
        values = payload[24 + rows * size:]
        for i in range(rows):
            self.values[streams[stream]][first + i] = floats_of(header["originals"],
                                                                values[i * size:(i + 1) * size])

    def add_record(self, streams, d, payload):
        stream, layer, _, first, heads, blocks, tokens, _ = struct.unpack_from("<6I2Q", payload)
        key = streams[stream]
        relative = self.tolerances[key][0] == "relative"

        def even(n):  # zeros up to 8 bytes
            return n + (-n) % 8
        at = 40 + even(4 * blocks)
        for h in range(heads):
            outcome, rung, _, _, keys, values = struct.unpack_from("<BBHIQQ", payload, at)
            figures = struct.unpack_from("<18d", payload, at + 24)
            at += 24 + 18 * 8 + 8 * blocks + even(8 * d) + even(8 * blocks)
            used = payload[at:at + blocks]
            at += even(blocks)
            self.steps[key][tokens][layer, first + h] = HeadStep(
                OUTCOMES[outcome], rung, figures[7] if relative else figures[0],
                figures[17] if relative else figures[16], (keys, values), used)
        if at != len(payload):
            raise Unusable(f"{self.folder}: a record of {len(payload)} bytes, expected {at}")


def same_token(a, b):
    if len(a) != len(b):
        return False
    distance = sum((x - y) ** 2 for x, y in zip(a, b))
    return distance <= SAME_TOKEN**2 * max(sum(x * x for x in a), sum(y * y for y in b))


def close(a, b, share):
    return abs(a - b) <= share * max(a, b)  # false for NaN


def on_two_sides(a, b, limit):
    return min(a, b) <= limit * (1 + SIDE) and max(a, b) >= limit * (1 - SIDE)


def beyond_promotion(x, limit):
    return x.outcome == "exact" and x.rung == 3 and min(x.bound, x.candidate) > limit


def classify(policy, a, b, limit, head_dim, other_originals):
    """The class of a difference; limit: the tolerance."""
    if not {a.outcome, b.outcome} <= KEPT[policy]:
        return "unexplained"
    for x in (a, b):  # what the records say of themselves must fit before they explain anything
        if x.outcome == "certified" and not x.bound <= limit * (1 + SIDE):
            return "unexplained"
        if x.outcome == "over" and not x.bound >= limit * (1 - SIDE):
            return "unexplained"
    if on_two_sides(a.candidate, b.candidate, limit):
        if close(a.candidate, b.candidate, rounding(head_dim)):
            return "straddle"
        if policy == "budget" and any(beyond_promotion(x, limit) for x in (a, b)):
            return "rounding"
        return "originals" if other_originals else "unexplained"
    if policy == "budget" and any(beyond_promotion(x, limit) for x in (a, b)):
        return "rounding"
    if policy in ("budget", "paper") and min(a.candidate, b.candidate) > limit:
        return "ladder order"
    return "unexplained"


def compare(a, b, say=print):
    """Lists the differences; how many there are of each class, and how many head-steps were compared."""
    if a.tolerances != b.tolerances:
        raise Unusable(f"{a.folder} and {b.folder} differ in requests, policies or tolerances")
    if (a.group, a.head_dim) != (b.group, b.head_dim):
        raise Unusable(f"{a.folder} and {b.folder} are of different models")
    counts = collections.Counter()
    for key in sorted(a.steps.keys() | b.steps.keys()):
        compare_sequence(a, b, key, counts, say)
    return counts


def compare_sequence(a, b, key, counts, say):
    request, policy = key
    unit, limit = a.tolerances[key]
    other = set()  # (layer, KV head) that no longer reads the same blocks from originals
    for tokens in sorted(a.steps[key].keys() | b.steps[key].keys()):
        rows = [r.values[key].get(tokens - 1) for r in (a, b)]
        where = f"request {request} {policy} context {tokens}"
        if None in rows:
            say(f"{where}: one run has ended; not compared from here on")
            counts["ended"] += 1
            return
        if not same_token(*rows):
            say(f"{where}: the tokens differ; not compared from here on")
            counts["diverged"] += 1
            return
        of_a, of_b = a.steps[key][tokens], b.steps[key][tokens]
        if of_a.keys() != of_b.keys():
            raise Unusable(f"{where}: the runs have recorded different heads")
        groups = collections.defaultdict(list)
        for layer, head in sorted(of_a):
            groups[layer, head // a.group].append(head)
        for (layer, kv_head), heads in groups.items():
            pairs = {h: (of_a[layer, h], of_b[layer, h]) for h in heads}
            differ = (layer, kv_head) in other
            if any(x.rung == y.rung == 0 and x.used != y.used for x, y in pairs.values()):
                differ = True  # what was learned before
            for head, (x, y) in pairs.items():
                counts["head-steps"] += 1
                if (x.outcome, x.rung) == (y.outcome, y.rung):
                    continue
                kind = classify(policy, x, y, limit, a.head_dim, differ)
                counts[kind] += 1
                say(f"{where} layer {layer} head {head}: {x.outcome} rung {x.rung} bound {x.bound:.6g} "
                    f"(before the ladder {x.candidate:.6g}) / {y.outcome} rung {y.rung} bound "
                    f"{y.bound:.6g} ({y.candidate:.6g}), tolerance {limit:g} {unit}: {kind}")
            if differ or any((x.rung, x.promoted, x.used) != (y.rung, y.promoted, y.used)
                             for x, y in pairs.values()):
                other.add((layer, kv_head))


def main(arguments):
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        counts = compare(*map(Run, arguments))
    except (Unusable, OSError) as e:
        print(f"compare_outcomes.py: {e}", file=sys.stderr)
        return 2
    kinds = ("straddle", "originals", "ladder order", "rounding", "unexplained")
    print(f"{counts['head-steps']} head-steps compared, {sum(counts[k] for k in kinds)} differ: "
          + ", ".join(f"{counts[k]} {k}" for k in kinds)
          + f"; {counts['diverged']} sequences diverged, {counts['ended']} ended in one run alone")
    if counts["head-steps"] == 0:
        print("compare_outcomes.py: nothing could be compared", file=sys.stderr)
        return 2
    return 1 if counts["unexplained"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
