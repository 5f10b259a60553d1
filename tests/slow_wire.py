"""A wire between two network namespaces that delays and loses frames: what `tc netem` does, where the
kernel has none.

    slow_wire.py PID DEVICE PID DEVICE

makes a TAP device in the network namespace of each process, and carries frames between the two until
stdin ends. Each line on stdin, "DELAY_MS LOSS", changes what happens to frames from then on, in both
directions alike. Says "ready" once the devices are there.
"""

import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import sys
import time

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
CLONE_NEWNET = 0x40000000
MAX_FRAME_BYTES = 65536


def tap_in(pid: str, name: str) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{pid}/ns/net", "rb") as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    # Without a virtio header the kernel fills in checksums and cuts large segments by itself.
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return tap


def carry(taps: dict[int, int]) -> None:
    delay_s, loss = 0.0, 0.0
    # In the order in which they are due; the number keeps frames of one time in order.
    waiting: list[tuple[float, int, int, bytes]] = []
    number = 0
    while True:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, to, frame = heapq.heappop(waiting)
            try:
                os.write(to, frame)
            except OSError:
                pass  # The device is down, or its queue full: a wire loses such frames too.
        patience = max(0.0, waiting[0][0] - now) if waiting else None
        readable, _, _ = select.select([*taps, sys.stdin], [], [], patience)
        for source in readable:
            if source is sys.stdin:
                line = sys.stdin.readline()
                if not line:
                    return
                delay_ms, loss_text = line.split()
                delay_s, loss = float(delay_ms) / 1000, float(loss_text)
                continue
            for _ in range(64):
                try:
                    frame = os.read(source, MAX_FRAME_BYTES)
                except OSError:
                    break
                if random.random() >= loss:
                    number += 1
                    due = time.monotonic() + delay_s
                    heapq.heappush(waiting, (due, number, taps[source], frame))


def main() -> None:
    first, second = tap_in(*sys.argv[1:3]), tap_in(*sys.argv[3:5])
    print("ready", flush=True)
    carry({first: second, second: first})


main()
