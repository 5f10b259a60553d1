#!/usr/bin/env python3
"""GB/s of NIXL's one-sided writes over UCX's tcp between two processes: BLOCK_BYTES BYTES.

Tuned as far as it goes: 64 KiB segments, as Baton sets them. Nothing is verified. Needs the package `nixl-cu12`.
"""

import ctypes
import os
import statistics
import subprocess
import sys
import time

os.environ.setdefault("UCX_TLS", "tcp,self")
os.environ.setdefault("UCX_NET_DEVICES", "lo")
os.environ.setdefault("UCX_TCP_TX_SEG_SIZE", "64k")
os.environ.setdefault("UCX_TCP_RX_SEG_SIZE", "64k")

ROUNDS = 3


def agent(name):
    from nixl_cu12._api import nixl_agent, nixl_agent_config

    return nixl_agent(name, nixl_agent_config(backends=["UCX"]))


def memory(nixl, bytes_):
    buffer = (ctypes.c_char * bytes_)()
    ctypes.memset(buffer, 1, bytes_)
    address = ctypes.addressof(buffer)
    return buffer, address, nixl.register_memory([(address, bytes_, 0, "")], "DRAM")


def receive(bytes_):
    nixl = agent("receiver")
    _buffer, address, _ = memory(nixl, bytes_)
    out = sys.stdout
    out.write(f"{address} {nixl.get_agent_metadata().hex()}\n")
    out.flush()
    # Over tcp the receiver must make progress; NIXL's own thread does so.
    sys.stdin.read()


def send(block, bytes_):
    peer = subprocess.Popen(
        [sys.executable, __file__, str(block), str(bytes_), "receive"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )
    line = ""
    while " " not in line or not line.split()[0].isdigit():
        line = peer.stdout.readline()
    address, metadata = line.split()
    nixl = agent("sender")
    _buffer, own, _ = memory(nixl, bytes_)
    name = nixl.add_remote_agent(bytes.fromhex(metadata))
    name = name.decode() if isinstance(name, bytes) else name
    blocks = bytes_ // block
    def descriptors(base, order):
        return nixl.get_xfer_descs([(base + place * block, block, 0) for place in order], "DRAM")

    local = descriptors(own, range(blocks))
    remote = descriptors(int(address), range(blocks - 1, -1, -1))
    handle = nixl.initialize_xfer("WRITE", local, remote, name, b"")
    seconds = []
    for _ in range(ROUNDS + 1):
        begun = time.monotonic()
        state = nixl.transfer(handle)
        while state not in ("DONE", "ERR"):
            state = nixl.check_xfer_state(handle)
        assert state == "DONE", state
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
