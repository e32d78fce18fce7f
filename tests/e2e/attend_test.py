#!/usr/bin/env python3
"""certkv attend against attention written out in Python: the returned bound holds, and bad tensors are
refused by name. No array library: a user can check the claim with as little."""

import array
import json
import math
import os
import random
import struct
import unittest

import harness
import product

QUERY_HEADS, KV_HEADS, TOKENS, DIM = 4, 2, 150, 64
# The oracle's own error: float64 sums of a few hundred terms, far below the last bit of an FP32 output.
ORACLE = 1e-12
TYPES = {"F32": "f", "F64": "d", "U8": "B", "I64": "q", "U16": "H"}


def bf16(x):
    """The 16 bits of x, of which only those a BF16 has may be set."""
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    assert bits & 0xffff == 0, x
    return bits >> 16


def rounded(x):
    """x with the 7 bits of mantissa that BF16 keeps, by truncation."""
    return struct.unpack("<f", struct.pack("<I", struct.unpack("<I", struct.pack("<f", x))[0]
                                           & 0xffff0000))[0]


def write_tensors(path, tensors):
    """name -> (shape, flat values that BF16 holds exactly)"""
    header, data = {}, b""
    for name, (shape, values) in tensors.items():
        raw = struct.pack(f"<{len(values)}H", *map(bf16, values))
        header[name] = {"dtype": "BF16", "shape": shape,
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)


def read_tensors(path):
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        data = file.read()
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            values = array.array(TYPES[entry["dtype"]])
            values.frombytes(data[slice(*entry["data_offsets"])])
            found[name] = (entry["shape"], values)
    return found


def make_case(kind, seed=7):
    """q [QUERY_HEADS][DIM], k and v [KV_HEADS][TOKENS][DIM], of numbers that BF16 holds."""
    r = random.Random(seed)

    def rows(count, scale):
        return [[rounded(r.gauss(0, scale)) for _ in range(DIM)] for _ in range(count)]
    q = rows(QUERY_HEADS, 1.5)
    k = [rows(TOKENS, 1.0) for _ in range(KV_HEADS)]
    v = [rows(TOKENS, 1.0) for _ in range(KV_HEADS)]
    if kind == "outlier channel":
        for head in k:
            for row in head:
                row[5] = rounded(row[5] * 60)
    elif kind == "common mean":
        for head in v:
            for row in head:
                row[:] = [rounded(300.0 + x) for x in row]
    elif kind == "zero values":
        v = [[[0.0] * DIM for _ in range(TOKENS)] for _ in range(KV_HEADS)]
    return q, k, v


def attention(q, k, v):
    """o[head], and the mean value norm under the weights, in float64."""
    out, scales = [], []
    for head, query in enumerate(q):
        keys, values = (x[head // (QUERY_HEADS // KV_HEADS)] for x in (k, v))
        scores = [math.fsum(a * b for a, b in zip(query, key)) / math.sqrt(DIM) for key in keys]
        weights = [math.exp(s - max(scores)) for s in scores]
        total = math.fsum(weights)
        out.append([math.fsum(w * row[c] for w, row in zip(weights, values)) / total
                    for c in range(DIM)])
        scales.append(math.fsum(w * math.hypot(*row) for w, row in zip(weights, values)) / total)
    return out, scales


def flat(rows):
    return [x for row in rows for x in (row if isinstance(row[0], float) else flat(row))]


class Attend(unittest.TestCase):
    def setUp(self):
        temporary = harness.temporary_folder()
        self.addCleanup(temporary.cleanup)
        self.source = os.path.join(temporary.name, "in.safetensors")
        self.target = os.path.join(temporary.name, "out.safetensors")

    def write(self, q, k, v, other_shapes=()):
        shapes = {"q": [QUERY_HEADS, DIM], "k": [KV_HEADS, TOKENS, DIM],
                  "v": [KV_HEADS, TOKENS, DIM], **dict(other_shapes)}
        write_tensors(self.source, {"q": (shapes["q"], flat(q)), "k": (shapes["k"], flat(k)),
                                    "v": (shapes["v"], flat(v))})

    def attend(self, *arguments):
        return product.certkv("attend", "--input", self.source, "--output", self.target, *arguments)

    def test_the_true_error_is_below_the_bound_under_every_policy_layout_and_input(self):
        quantised = 0
        for kind in ("random", "outlier channel", "common mean", "zero values"):
            case = make_case(kind)
            truth, scales = attention(*case)
            self.write(*case)
            for policy in ("budget", "paper", "naive", "dense"):
                for layout in ("compact", "balanced", "paper"):
                    self.attend("--policy", policy, "--layout", layout).expect_exit(0)
                    out = read_tensors(self.target)
                    with self.subTest(kind=kind, policy=policy, layout=layout):
                        quantised += self.check(out, policy, truth, scales)
        self.assertGreater(quantised, 0)  # some errors are real ones, of quantised keys and values

    def check(self, out, policy, truth, scales):
        self.assertEqual(out["o"][0], [QUERY_HEADS, DIM])
        self.assertEqual(out["block_log_mass"][0], [QUERY_HEADS, math.ceil(TOKENS / 16)])
        seen = 0
        for head in range(QUERY_HEADS):
            o = out["o"][1][head * DIM:(head + 1) * DIM]
            error, bound = math.dist(o, truth[head]), out["bound"][1][head]
            self.assertTrue(math.isfinite(bound))
            self.assertLessEqual(error, bound + ORACLE * scales[head])
            seen += error > 1e-4 * scales[head]
            outcome = out["outcome"][1][head]
            if policy == "budget":
                self.assertIn(outcome, (0, 1))
            if policy == "dense":
                self.assertEqual(outcome, 1)
            if outcome == 0:
                self.assertLessEqual(out["relative"][1][head], 0.05)
            if outcome == 3:
                self.assertIn(policy, ("paper", "naive"))
        return seen

    def test_a_tight_tolerance_is_kept_or_the_answer_is_exact(self):
        case = make_case("random")
        truth, _ = attention(*case)
        self.write(*case)
        self.attend("--tolerance-absolute", "1e-3").expect_exit(0)
        out = read_tensors(self.target)
        for head in range(QUERY_HEADS):
            error = math.dist(out["o"][1][head * DIM:(head + 1) * DIM], truth[head])
            self.assertLessEqual(error, out["bound"][1][head])
            self.assertLessEqual(out["bound"][1][head], 1e-3)
            self.assertIn(out["outcome"][1][head], (0, 1))

    def test_nan_and_infinity_are_refused_with_the_tensor_and_the_element(self):
        for name, index in (("q", 3), ("k", 100), ("v", 5000)):
            for bad in (math.nan, math.inf):
                tensors = dict(zip("qkv", map(flat, make_case("random"))))
                tensors[name][index] = rounded(bad)
                shape = [KV_HEADS, TOKENS, DIM]
                write_tensors(self.source, {"q": ([QUERY_HEADS, DIM], tensors["q"]),
                                            "k": (shape, tensors["k"]), "v": (shape, tensors["v"])})
                job = self.attend()
                job.expect_exit(1).expect_text("certkv: error: ", f"{name} is NaN or infinite", f"element {index}")
                self.assertFalse(os.path.exists(self.target))

    def test_tensors_of_the_wrong_shape_are_refused_by_name(self):
        case = make_case("random")
        for shapes, text in (({"q": [QUERY_HEADS * DIM]}, "q is [256]"),
                             ({"k": [KV_HEADS * TOKENS, DIM]}, "k is [300, 64]"),
                             ({"v": [KV_HEADS, DIM, TOKENS]}, "must be alike"),
                             ({"q": [2 * QUERY_HEADS, DIM // 2]}, "q has head_dim 32, k has 64")):
            self.write(*case, shapes)
            self.attend().expect_exit(2).expect_text("certkv: error: ", text)

    def test_a_file_that_is_missing_torn_or_without_a_tensor_is_refused(self):
        self.attend().expect_exit(2).expect_text("in.safetensors")
        self.write(*make_case("random"))
        os.truncate(self.source, os.path.getsize(self.source) - 100)
        self.attend().expect_exit(2).expect_text("certkv: error: ", "in.safetensors")
        write_tensors(self.source, {"q": ([1, DIM], [1.0] * DIM)})
        self.attend().expect_exit(2).expect_text("certkv: error: ", "k")


if __name__ == "__main__":
    product.main()
