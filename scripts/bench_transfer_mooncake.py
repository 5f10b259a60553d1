#!/usr/bin/env python3
"""GB/s of Mooncake's writes over tcp between two processes: BLOCK_BYTES BYTES.

Nothing is verified or encrypted. Needs the package `mooncake-transfer-engine` or one of its kin.
"""

import ctypes
import statistics
import subprocess
import sys
import time

ROUNDS = 3


def engine():
    from mooncake.engine import TransferEngine

    made = TransferEngine()
    if made.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
        raise SystemExit("Mooncake does not start")
    return made


def memory(mooncake, bytes_):
    buffer = (ctypes.c_char * bytes_)()
    ctypes.memset(buffer, 1, bytes_)
    address = ctypes.addressof(buffer)
    if mooncake.register_memory(address, bytes_) != 0:
        raise SystemExit("Mooncake does not register memory")
    return buffer, address


def receive(bytes_):
    mooncake = engine()
    _buffer, address = memory(mooncake, bytes_)
    print(f"here 127.0.0.1:{mooncake.get_rpc_port()} {address}", flush=True)
    sys.stdin.read()


def send(block, bytes_):
    peer = subprocess.Popen(
        [sys.executable, __file__, str(block), str(bytes_), "receive"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )
    line = ""
    while not line.startswith("here "):
        line = peer.stdout.readline()
    _, name, address = line.split()
    mooncake = engine()
    _buffer, own = memory(mooncake, bytes_)
    blocks = bytes_ // block
    sources = [own + place * block for place in range(blocks)]
    targets = [int(address) + place * block for place in range(blocks - 1, -1, -1)]
    lengths = [block] * blocks
    seconds = []
    for _ in range(ROUNDS + 1):
        begun = time.monotonic()
        if mooncake.batch_transfer_sync_write(name, sources, targets, lengths) != 0:
            raise SystemExit("Mooncake does not write")
        seconds.append(time.monotonic() - begun)
    print(blocks * block / 1e9 / statistics.median(seconds[1:]), flush=True)
    peer.stdin.close()
    peer.wait(10)


if __name__ == "__main__":
    BLOCK, BYTES = int(sys.argv[1]), int(sys.argv[2])
    if sys.argv[3:] == ["receive"]:
        receive(BYTES)
    else:
        send(BLOCK, BYTES)
