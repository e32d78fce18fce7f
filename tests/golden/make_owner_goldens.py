#!/usr/bin/env python3
"""The owners that tests/kvstore/content_owner_test.cc expects, from kvstore/FORMAT.md alone."""

import hashlib
import struct

SEGMENT, BF16 = 512, 2


def sha(data):
    return hashlib.sha256(data).digest()


before = sha(b"certkv originals, format 1")
model, layout = sha(b"a model"), sha(b"a layout")
for segment in range(2):
    tokens = struct.pack("<512i", *range(segment * SEGMENT, (segment + 1) * SEGMENT))
    before = sha(before + model + layout + bytes([BF16]) + tokens)
    hi, lo = struct.unpack("<QQ", before[:16])
    print(f"{{0x{hi | 1 << 63:016x}, 0x{lo:016x}}}")
