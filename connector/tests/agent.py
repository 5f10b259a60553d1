"""A worker in pure Python: owns the socket and the arena, and carries blocks from exports to loads.

It plays both ends of the transfer at once: one engine can produce a handoff and later consume it.
"""

import atexit
import contextlib
import mmap
import os
import shutil
import socket
import tempfile
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from baton_connector import frames

PATIENCE_SECONDS = 60.0


@dataclass
class Handoff:
    blocks: dict[int, bytes] = field(default_factory=dict)
    sealed: dict[str, Any] | None = None
    subscribed: dict[str, Any] | None = None
    sent: set[int] = field(default_factory=set)
    sent_bytes: int = 0
    completed: bool = False
    broken: str | None = None
    """Consumers are told that it failed, and why."""
    withheld: bool = False
    """Consumers are told nothing."""
    kept: bool = False
    """Its export slots are not released."""


Key = tuple[str, int]

PEER = 3
"""The number of another worker's arena."""
PEER_SLOTS = 96


class Agent:
    """Listens from the start, and serves one connection after another."""

    def __init__(
        self,
        *,
        export_slots: int = 64,
        import_slots: int = 8,
        refuse: str | None = None,
        path: str | None = None,
    ) -> None:
        self.directory = tempfile.mkdtemp(prefix="baton-agent-")
        # Not at close: another agent may take its path.
        atexit.register(shutil.rmtree, self.directory, ignore_errors=True)
        self.path = path or os.path.join(self.directory, "kv.sock")
        self.export_slots, self.import_slots, self.refuse = export_slots, import_slots, refuse
        self.hello: dict[str, Any] = {}
        self.messages: list[dict[str, Any]] = []
        self.handoffs: dict[Key, Handoff] = {}
        self.attachments = 0
        self.steps: list[dict[str, Any]] = []
        """As the engine's scheduler told of them."""
        self.schedulers = 0
        self._changed = threading.Condition()
        self._connection: socket.socket | None = None
        self._scheduler: socket.socket | None = None
        self._free_import: list[int] = []
        self.leaves_blocks_there = False
        """Consumers load them from where they lie in another worker's arena, once that is mapped."""
        self.peer_path = ""
        self._peer: memoryview | None = None
        self._free_peer: list[int] = []
        self._peer_slot_of: dict[tuple[Key, int], int] = {}
        self._export_held: set[int] = set()
        self._arena: memoryview | None = None
        self._slot_bytes = 0
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self._listener.bind(self.path)
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.disconnect()
        self.close_scheduler()

    def disconnect(self) -> None:
        with self._changed:
            if self._connection is not None:
                with contextlib.suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RDWR)

    def close_scheduler(self) -> None:
        with self._changed:
            if self._scheduler is not None:
                with contextlib.suppress(OSError):
                    self._scheduler.shutdown(socket.SHUT_RDWR)
                self._scheduler = None

    def handoff(self, key: Key) -> Handoff:
        return self.handoffs.setdefault(key, Handoff())

    def wait(self, ready: Callable[[], Any], what: str = "the agent's condition") -> Any:
        """Waits until ``ready``, which is asked under the agent's lock after each message."""
        with self._changed:
            if not self._changed.wait_for(ready, PATIENCE_SECONDS):
                raise AssertionError(f"{what} did not come; messages: {self.messages[-20:]}")
            return ready()

    def send(self, message: dict[str, Any]) -> None:
        with self._changed:
            assert self._connection is not None
            self._connection.sendall(frames.encode(message))

    def seen(self, kind: str, key: Key | None = None) -> list[dict[str, Any]]:
        return [
            m
            for m in self.messages
            if m["type"] == kind and (key is None or (m["handoff"], m["generation"]) == key)
        ]

    def checksum(self, slot: int) -> int:
        return zlib.crc32(self.read_slot(slot)[: self.hello["compatibility"]["block_bytes"]])

    def release_all(self) -> None:
        with self._changed:
            slots, self._export_held = sorted(self._export_held), set()
        self.send({"type": "release", "slots": slots})

    def write_import(self, slot: int, data: bytes) -> None:
        assert self._arena is not None
        start = slot * self._slot_bytes
        self._arena[start : start + len(data)] = data

    def read_slot(self, slot: int) -> bytes:
        assert self._arena is not None
        return bytes(self._arena[slot * self._slot_bytes :][: self._slot_bytes])

    def map_peer(self) -> None:
        """Has the connector map another worker's arena, and waits until it has."""
        self.peer_path = os.path.join(self.directory, f"peer-{self.attachments}")
        size = self._slot_bytes * PEER_SLOTS
        with open(os.open(self.peer_path, os.O_RDWR | os.O_CREAT, 0o600), "w+b") as file:
            file.truncate(size)
            self._peer = memoryview(mmap.mmap(file.fileno(), size))
        self._free_peer = list(range(PEER_SLOTS))
        self.send({"type": "map", "arena": PEER, "file": self.peer_file()})

    def peer_file(self) -> dict[str, Any]:
        found = os.stat(self.peer_path)
        numbers = {"device": found.st_dev, "inode": found.st_ino, "len_bytes": found.st_size}
        return {"path": self.peer_path, **numbers}

    def answers_about(self, number: int) -> list[dict[str, Any]]:
        return [m for m in self.messages if m["type"] == "mapped" and m["arena"] == number]

    def write_peer(self, slot: int, data: bytes) -> int:
        """Answers the offset."""
        assert self._peer is not None
        start = slot * self._slot_bytes
        self._peer[start : start + len(data)] = data
        return start

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        hello = frames.receive(connection)
        if hello is None:
            return
        assert hello["protocol"] == 5
        if hello["type"] == "scheduler":
            self._serve_scheduler(connection)
        else:
            self._serve_connector(connection, hello)

    def _serve_scheduler(self, connection: socket.socket) -> None:
        with self._changed:
            connection.sendall(frames.encode({"type": "attached", "protocol": 5}))
            self._scheduler = connection
            self.schedulers += 1
            self._changed.notify_all()
        with contextlib.suppress(OSError, frames.FrameError):
            while (message := frames.receive(connection)) is not None:
                with self._changed:
                    self.steps += message["steps"]
                    self._changed.notify_all()

    def pace(self, pace: dict[str, Any] | None) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._scheduler, PATIENCE_SECONDS)
            self._scheduler.sendall(frames.encode({"type": "pace", "pace": pace}))

    def _serve_connector(self, connection: socket.socket, hello: dict[str, Any]) -> None:
        assert hello["type"] == "hello"
        self.hello = hello
        if self.refuse:
            connection.sendall(frames.encode({"type": "refused", "reason": self.refuse}))
            connection.close()
            return
        with self._changed:
            self._connection = connection
            welcome = self._make_arena(hello["compatibility"]["block_bytes"])
            connection.sendall(frames.encode(welcome))
            self.attachments += 1
            self._changed.notify_all()
        with contextlib.suppress(OSError, frames.FrameError):
            while (message := frames.receive(connection)) is not None:
                with self._changed:
                    self.messages.append(message)
                    self._take(message)
                    self._changed.notify_all()

    def _make_arena(self, block_bytes: int) -> dict[str, Any]:
        self._slot_bytes = -(-block_bytes // 4096) * 4096
        total = self._slot_bytes * (self.export_slots + self.import_slots)
        path = os.path.join(self.directory, f"arena-{self.attachments}")
        with open(path, "w+b") as file:
            file.truncate(total)
            self._arena = memoryview(mmap.mmap(file.fileno(), total))
        self._free_import = list(range(self.export_slots, self.export_slots + self.import_slots))
        self._export_held = set()
        return {
            "type": "welcome",
            "protocol": 5,
            "arena": path,
            "slot_bytes": self._slot_bytes,
            "first_export_slot": 0,
            "export_slots": self.export_slots,
            "first_import_slot": self.export_slots,
            "import_slots": self.import_slots,
        }

    def _take(self, message: dict[str, Any]) -> None:
        if message["type"] == "mapped":
            return
        key = (message["handoff"], message["generation"])
        handoff = self.handoff(key)
        kind = message["type"]
        if kind == "exported":
            for block in message["blocks"]:
                handoff.blocks[block["index"]] = self.read_slot(block["slot"])
            slots = [block["slot"] for block in message["blocks"]]
            if handoff.kept:
                self._export_held.update(slots)
            else:
                self.send({"type": "release", "slots": slots})
        elif kind == "sealed":
            handoff.sealed = message
        elif kind == "subscribe":
            handoff.subscribed = message
        elif kind == "loaded":
            self._free_import += message["slots"]
        elif kind == "loaded_mapped":
            self._free_peer += [self._peer_slot_of.pop((key, i)) for i in message["indices"]]
        self.pump()

    def pump(self) -> None:
        with self._changed:
            for key, handoff in self.handoffs.items():
                self._pump_one(key, handoff)

    def _pump_one(self, key: Key, handoff: Handoff) -> None:
        if handoff.subscribed is None or handoff.withheld or handoff.completed:
            return
        name = {"handoff": key[0], "generation": key[1]}
        if handoff.broken is not None:
            handoff.completed = True
            self.send({"type": "failed", **name, "reason": handoff.broken})
            return
        first = handoff.subscribed["first_block"]
        wanted = sorted(i for i in handoff.blocks if i >= first and i not in handoff.sent)
        if self.leaves_blocks_there:
            self._leave_there(key, handoff, wanted)
        load = []
        while wanted and self._free_import:
            index, slot = wanted.pop(0), self._free_import.pop()
            self.write_import(slot, handoff.blocks[index])
            handoff.sent.add(index)
            handoff.sent_bytes += self.hello["compatibility"]["block_bytes"]
            load.append({"index": index, "slot": slot, "crc32": self.checksum(slot)})
        if load:
            self.send({"type": "load", **name, "blocks": load})
        if handoff.sealed and not wanted and not self._outstanding(handoff):
            same = all(
                handoff.sealed[field] == handoff.subscribed[field]
                for field in ("prompt_tokens", "prompt_digest")
            )
            handoff.completed = True
            if same:
                self.send({"type": "complete", **name})
            else:
                self.send({"type": "failed", **name, "reason": "the digests differ"})

    def _leave_there(self, key: Key, handoff: Handoff, wanted: list[int]) -> None:
        blocks, size = [], self.hello["compatibility"]["block_bytes"]
        while wanted and self._free_peer:
            index, slot = wanted.pop(0), self._free_peer.pop()
            self._peer_slot_of[key, index] = slot
            data = handoff.blocks[index][:size]
            offset = self.write_peer(slot, data)
            handoff.sent.add(index)
            blocks.append({"index": index, "offset": offset, "crc32": zlib.crc32(data)})
        if blocks:
            name = {"handoff": key[0], "generation": key[1]}
            self.send({"type": "load_mapped", **name, "arena": PEER, "blocks": blocks})

    def _outstanding(self, handoff: Handoff) -> bool:
        assert handoff.subscribed is not None and handoff.sealed is not None
        if self._peer_slot_of:
            return True
        compatibility = self.hello["compatibility"]
        blocks = -(-handoff.sealed["prompt_tokens"] // compatibility["block_size_tokens"])
        indices = range(handoff.subscribed["first_block"], blocks * compatibility["layer_groups"])
        return len(self._free_import) < self.import_slots or not set(indices) <= set(handoff.blocks)
