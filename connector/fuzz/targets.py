"""Every place of the connector that reads bytes of its worker, or what a request brings with it. Each takes
any bytes, and checks what must be true whatever they are."""

import atexit
import json
import os
import tempfile
import uuid
import zlib
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from baton_connector import frames
from baton_connector.arena import Arena, ArenaError
from baton_connector.handoff import HandoffKey, read_part
from baton_connector.layout import PagedCache
from baton_connector.link import Attached, Link, Refused, arrived
from baton_connector.pacing import MIN_CHUNK_TOKENS, Pace
from baton_connector.plan import StepPlan, Subscribe
from baton_connector.worker_side import WorkerSide

KEY = HandoffKey(uuid.UUID(int=1), 0)
EXPORTS, IMPORTS = range(0, 4), range(4, 8)
BLOCKS, OURS = 8, [2, 5, 6]
"""Blocks of the cache, and those that are loaded into."""
SLOT_BYTES = 64


class Wire:
    """A socket from which these bytes come, a few at a time."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def recv(self, most: int) -> bytes:
        part, self._data = self._data[: min(most, 7)], self._data[min(most, 7) :]
        return part


def messages(data: bytes) -> list[dict[str, Any]]:
    wire, received = Wire(data), []
    try:
        while (message := frames.receive(wire)) is not None:  # type: ignore[arg-type]
            received.append(message)
    except frames.FrameError:
        pass
    return received


def connector_frames(data: bytes) -> None:
    for message in messages(data):
        assert isinstance(message["type"], str)


def arena_file() -> str:
    descriptor, path = tempfile.mkstemp(prefix="baton-fuzz-")
    os.write(descriptor, bytes(range(SLOT_BYTES)) * IMPORTS.stop)
    os.close(descriptor)
    atexit.register(os.unlink, path)
    return path


ARENA_FILE = arena_file()
HALF_FILLED = Arena(ARENA_FILE, SLOT_BYTES, EXPORTS, IMPORTS)


def connector_welcome(data: bytes) -> None:
    """What a worker answers to a hello. It names a file that is there."""
    link = Link("", {}, block_bytes=16)
    for answer in messages(data):
        if isinstance(answer.get("arena"), str):
            answer["arena"] = ARENA_FILE
        try:
            arena = link._welcomed(answer)
        except (Refused, ArenaError, frames.FrameError):
            continue
        for slot in (*arena.exports[:9], *arena.imports[:9]):
            assert arena.slot(slot).numel() == arena.slot_bytes


class Connection:
    def __init__(self) -> None:
        self.arena, self.sent, self.closed = HALF_FILLED, [], False

    def send(self, message: dict[str, Any]) -> None:
        self.sent.append(json.loads(json.dumps(message)))

    def close(self) -> None:
        self.closed = True


def of_a_file(message: dict[str, Any]) -> dict[str, Any]:
    """An arena that is to be mapped is one that is there."""
    file = message.get("file")
    if message["type"] == "map" and isinstance(file, dict) and isinstance(file.get("path"), str):
        found = os.stat(ARENA_FILE)
        there = {"path": ARENA_FILE, "device": found.st_dev, "inode": found.st_ino}
        return {**message, "file": {**file, **there}}
    return message


def connector_messages(data: bytes) -> None:
    """What a worker says later, while one request waits for its blocks."""
    cache = PagedCache({"l": torch.zeros((BLOCKS, 2, 1, 8))}, BLOCKS)
    events: list[Any] = []
    link = SimpleNamespace(drain=lambda: [events.pop(0) for _ in events[:]], stop=lambda: None)
    worker = WorkerSide(cache, link)  # type: ignore[arg-type]
    connection = Connection()
    events.append(Attached(connection))  # type: ignore[arg-type]
    worker.after_forward(StepPlan(seq=1, subscribes=[Subscribe("r", KEY, 1, OURS, 7, "ab" * 32)]))
    received, failed, seq = Counter[str](), set(), 1
    for message in messages(data):
        if connection.closed:
            break
        try:
            events.append(arrived(of_a_file(message)))
        except frames.FrameError:
            break
        seq += 1
        worker.after_forward(StepPlan(seq=seq))
        results = worker.results()
        received.update(results.finished_recving)
        failed |= results.failed_recving or set()
    assert received in (Counter(), Counter(r=1)), "it is told once"
    expected = torch.frombuffer(bytearray(range(SLOT_BYTES)), dtype=torch.uint8)
    for block in range(BLOCKS):
        found = torch.zeros(SLOT_BYTES, dtype=torch.uint8)
        cache.copy_out(block, found)
        is_empty, is_loaded = not found.any(), bool((found == expected).all())
        assert is_empty or (is_loaded and block in OURS)
        if received and "r" not in failed:
            assert is_loaded or block not in OURS, "it starts with all of its blocks"


def connector_pace(data: bytes) -> None:
    """The pace that steps shall keep, and what a step then takes in."""
    for message in messages(data):
        try:
            pace = Pace.read(message["pace"])
        except (KeyError, TypeError, ValueError):
            continue
        if pace is not None:
            tokens = pace.prefill_tokens(3, 1000, [(0, 5000), (512, 1), (100_000, 7)])
            assert MIN_CHUNK_TOKENS <= tokens <= 5008


def connector_part(data: bytes) -> None:
    """``kv_transfer_params`` of a request."""
    try:
        params = json.loads(data)
    except (ValueError, RecursionError):
        return
    if params is None or isinstance(params, dict):
        part = read_part(params)
        assert part is None or part.key is None or 0 <= part.key.generation < 1 << 32


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        connector_frames,
        connector_welcome,
        connector_messages,
        connector_pace,
        connector_part,
    )
}

CRC32 = zlib.crc32(bytes(range(SLOT_BYTES)))
"""Of each slot, for whoever writes a case down."""
