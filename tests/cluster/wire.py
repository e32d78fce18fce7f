#!/usr/bin/env python3
"""A switch of user space that loses, delays, repeats, reorders and alters frames, by a seed.

    wire.py [--seed S] [--loss P] [--delay MS] [--jitter MS] [--duplicate P] [--corrupt P] PORT...
    wire.py --offload-off PORT     (inside a host: whole frames of the wire's size, with checksums)

Prints `ready`; then a line on standard input changes it: `loss 0.1`, `drop 0 1` (nothing more from
port 0 to port 1), `pass 0 1`. Ends with its standard input, and says what it did. A frame that is altered has one bit
flipped behind its Ethernet header, which the receiver's checksum has to see.
"""

import argparse
import ctypes
import fcntl
import heapq
import json
import random
import select
import socket
import struct
import sys
import time

SIOCETHTOOL = 0x8946
OFFLOADS = (0x17, 0x1F, 0x24, 0x2C)  # checksums, TSO, GSO, GRO: ETHTOOL_STXCSUM, ..
OUTGOING = 4  # PACKET_OUTGOING: what this very socket has sent
HEADER = 14


def offload_off(port):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for command in OFFLOADS:
            value = ctypes.create_string_buffer(struct.pack("II", command, 0))
            request = struct.pack("16sP", port.encode(), ctypes.addressof(value)) + bytes(16)
            try:
                fcntl.ioctl(any_socket, SIOCETHTOOL, request)
            except OSError as error:
                sys.exit(f"wire.py: {port}: offload {command:#x}: {error}")


class Wire:
    def __init__(self, options):
        self.draw = random.Random(options.seed)
        self.settings = {name: getattr(options, name)
                         for name in ("loss", "delay", "jitter", "duplicate", "corrupt")}
        self.ports = []
        for name in options.ports:
            port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            port.bind((name, 0))
            port.setblocking(False)
            self.ports.append(port)
        self.dropped = set()  # (from, to)
        self.waiting = []     # heap of (when, number, to, frame)
        self.number = 0
        self.done = {"carried": 0, "lost": 0, "altered": 0, "repeated": 0}

    def tell(self, line):
        word, *rest = line.split()
        if word in ("drop", "pass"):
            pair = (int(rest[0]), int(rest[1]))
            (self.dropped.add if word == "drop" else self.dropped.discard)(pair)
        elif word in self.settings:
            self.settings[word] = float(rest[0])
        else:
            sys.exit(f"wire.py: '{line}' is no command")

    def receive(self, index):
        for _ in range(64):
            try:
                frame, address = self.ports[index].recvfrom(70000)
            except (BlockingIOError, OSError):
                return
            if address[2] == OUTGOING:
                continue
            for to in range(len(self.ports)):
                if to != index and (index, to) not in self.dropped:
                    self.take(to, frame)

    def take(self, to, frame):
        s, draw = self.settings, self.draw
        if draw.random() < s["loss"]:
            self.done["lost"] += 1
            return
        if draw.random() < s["corrupt"] and len(frame) > HEADER:
            altered = bytearray(frame)
            altered[draw.randrange(HEADER, len(frame))] ^= 1 << draw.randrange(8)
            frame = bytes(altered)
            self.done["altered"] += 1
        copies = 2 if draw.random() < s["duplicate"] else 1
        self.done["carried"] += 1
        self.done["repeated"] += copies - 1
        for _ in range(copies):
            when = time.monotonic() + (s["delay"] + draw.random() * s["jitter"]) / 1000
            self.number += 1
            heapq.heappush(self.waiting, (when, self.number, to, frame))

    def send_due(self):
        now = time.monotonic()
        while self.waiting and self.waiting[0][0] <= now:
            _, _, to, frame = heapq.heappop(self.waiting)
            try:
                self.ports[to].send(frame)
            except OSError:
                pass  # a full queue or a link that is down loses frames, as wires do

    def run(self):
        while True:
            rest = max(0, self.waiting[0][0] - time.monotonic()) if self.waiting else None
            ready, _, _ = select.select([sys.stdin, *self.ports], [], [], rest)
            for one in ready:
                if one is sys.stdin:
                    line = sys.stdin.readline()
                    if not line:
                        print(json.dumps(self.done), flush=True)
                        return
                    self.tell(line)
                else:
                    self.receive(self.ports.index(one))
            self.send_due()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    for name in ("loss", "delay", "jitter", "duplicate", "corrupt"):
        parser.add_argument("--" + name, type=float, default=0.0)
    parser.add_argument("--offload-off", action="store_true")
    parser.add_argument("ports", nargs="+")
    options = parser.parse_args()
    if options.offload_off:
        for port in options.ports:
            offload_off(port)
        return
    wire = Wire(options)
    print("ready", flush=True)
    wire.run()


if __name__ == "__main__":
    main()
