#!/usr/bin/env python3
"""GB/s of what others write blocks with over tcp, between two processes: nixl|mooncake BLOCK_BYTES BYTES.

Neither verifies or encrypts. Needs the package `nixl-cu12`, or `mooncake-transfer-engine` or one of its kin.
"""

import ctypes
import os
import statistics
import subprocess
import sys
import time

ROUNDS = 3


def touched(bytes_):
    """Memory that was touched, and its address."""
    buffer = (ctypes.c_char * bytes_)()
    ctypes.memset(buffer, 1, bytes_)
    return buffer, ctypes.addressof(buffer)


class Nixl:
    """One-sided writes over UCX's tcp, tuned as far as it goes: by segments that hold a block."""

    ENVIRONMENT = {
        "UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "lo",
        "UCX_TCP_TX_SEG_SIZE": "136k", "UCX_TCP_RX_SEG_SIZE": "136k",
    }

    def __init__(self, name, bytes_):
        from nixl_cu12._api import nixl_agent, nixl_agent_config

        self.agent = nixl_agent(name, nixl_agent_config(backends=["UCX"]))
        self.buffer, self.address = touched(bytes_)
        self.agent.register_memory([(self.address, bytes_, 0, "")], "DRAM")

    def where(self):
        # Over tcp the receiver must make progress; NIXL's own thread does so.
        return [str(self.address), self.agent.get_agent_metadata().hex()]

    def writer(self, where, block, blocks):
        address, metadata = int(where[0]), bytes.fromhex(where[1])
        name = self.agent.add_remote_agent(metadata)
        name = name.decode() if isinstance(name, bytes) else name

        def descriptors(base, order):
            return self.agent.get_xfer_descs([(base + place * block, block, 0) for place in order], "DRAM")

        local = descriptors(self.address, range(blocks))
        remote = descriptors(address, range(blocks - 1, -1, -1))
        handle = self.agent.initialize_xfer("WRITE", local, remote, name, b"")

        def write():
            state = self.agent.transfer(handle)
            while state not in ("DONE", "ERR"):
                state = self.agent.check_xfer_state(handle)
            if state != "DONE":
                raise SystemExit(f"NIXL does not write: {state}")

        return write


class Mooncake:
    ENVIRONMENT = {}
    # Its queue turns a longer batch away ("TCP lane queue-full"), and the whole of it fails.
    BATCH_BLOCKS = 1024

    def __init__(self, _name, bytes_):
        from mooncake.engine import TransferEngine

        self.engine = TransferEngine()
        if self.engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
            raise SystemExit("Mooncake does not start")
        self.buffer, self.address = touched(bytes_)
        if self.engine.register_memory(self.address, bytes_) != 0:
            raise SystemExit("Mooncake does not register memory")

    def where(self):
        return [f"127.0.0.1:{self.engine.get_rpc_port()}", str(self.address)]

    def writer(self, where, block, blocks):
        name, address = where[0], int(where[1])
        sources = [self.address + place * block for place in range(blocks)]
        targets = [address + place * block for place in range(blocks - 1, -1, -1)]
        lengths = [block] * blocks

        def write():
            for first in range(0, blocks, self.BATCH_BLOCKS):
                batch = slice(first, first + self.BATCH_BLOCKS)
                written = self.engine.batch_transfer_sync_write(
                    name, sources[batch], targets[batch], lengths[batch]
                )
                if written != 0:
                    raise SystemExit(f"Mooncake does not write: {written}")

        return write


PEERS = {"nixl": Nixl, "mooncake": Mooncake}


def receive(peer, bytes_):
    receiver = peer("receiver", bytes_)
    print("here", *receiver.where(), flush=True)
    sys.stdin.read()


def send(peer, arguments, block, bytes_):
    receiver = subprocess.Popen(
        [sys.executable, __file__, *arguments, "receive"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )
    # Both libraries write words of their own.
    line = ""
    while not line.startswith("here "):
        line = receiver.stdout.readline()
        if not line:
            raise SystemExit("the receiver ended")
    blocks = bytes_ // block
    sender = peer("sender", bytes_)
    write = sender.writer(line.split()[1:], block, blocks)
    seconds = []
    for _ in range(ROUNDS + 1):
        begun = time.monotonic()
        write()
        seconds.append(time.monotonic() - begun)
    print(blocks * block / 1e9 / statistics.median(seconds[1:]), flush=True)
    receiver.stdin.close()
    receiver.wait(10)


def main():
    arguments = sys.argv[1:4]
    peer, block, bytes_ = PEERS[arguments[0]], int(arguments[1]), int(arguments[2])
    for name, value in peer.ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if sys.argv[4:] == ["receive"]:
        receive(peer, bytes_)
    else:
        send(peer, arguments, block, bytes_)


if __name__ == "__main__":
    main()
