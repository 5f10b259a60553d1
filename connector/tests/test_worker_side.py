"""The worker's half over a real socket and arena, with a cache of a few small blocks."""

import os
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from agent import PEER, PEER_SLOTS, Agent
from fakes import KEY, OTHER_KEY

from baton_connector import link as link_module
from baton_connector.arena import ArenaError
from baton_connector.layout import PagedCache
from baton_connector.link import Link, Refused
from baton_connector.plan import Export, ExportEnd, Seal, StepPlan, Subscribe
from baton_connector.worker_side import WorkerSide

BLOCKS = 16
SEAL = Seal(prompt_tokens=7, prompt_digest="ab" * 32, cached_tokens=0)
NAME = (str(KEY.handoff), KEY.generation)
OTHER_NAME = (str(OTHER_KEY.handoff), OTHER_KEY.generation)
PATIENCE_SECONDS = 30.0


class Fixture:
    """A worker's half that is stepped by hand."""

    def __init__(self, layer_groups: int = 1, **agent) -> None:
        self.agent = Agent(**agent)
        generator = torch.Generator().manual_seed(0)
        self.layers = {
            f"l{i}": torch.rand((BLOCKS, 2, 4, 8), generator=generator) for i in range(3)
        }
        self.cache = PagedCache(self.layers, BLOCKS, layer_groups=layer_groups)
        self.link = Link(self.agent.path, hello(self.cache), self.cache.block_bytes)
        self.link.start()
        self.worker = WorkerSide(self.cache, self.link)
        self.seq = 0
        self.sent: list[str] = []
        self.received: list[str] = []
        self.failed: list[str] = []

    def close(self) -> None:
        self.worker.stop()
        self.agent.close()

    def step(self, **plan) -> None:
        self.seq += 1
        made = StepPlan(seq=self.seq, **plan)
        self.worker.before_forward(made)
        self.worker.after_forward(made)
        results = self.worker.results()
        self.sent += results.finished_sending
        self.received += results.finished_recving
        self.failed += results.failed_recving

    def step_until(self, ready, what: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not ready():
            assert time.monotonic() < deadline, f"{what} did not come: {self.agent.messages}"
            self.step()
            time.sleep(0.001)

    def block(self, block_id: int, group: int = 0) -> bytes:
        slot = torch.zeros(self.cache.block_bytes, dtype=torch.uint8)
        self.cache.copy_out(block_id, slot, group)
        return bytes(slot.tolist())

    def tell(self, kind: str, name=NAME, **fields) -> None:
        self.agent.send({"type": kind, "handoff": name[0], "generation": name[1], **fields})

    def told(self, kind: str, name=NAME):
        self.agent.wait(lambda: self.agent.seen(kind, name), kind)
        return self.agent.seen(kind, name)


def hello(cache: PagedCache) -> dict:
    return {
        "compatibility": {
            "block_bytes": cache.block_bytes,
            "block_size_tokens": 4,
            "layer_groups": cache.layer_groups,
        }
    }


@pytest.fixture
def fixture() -> Iterator[Fixture]:
    fixture = Fixture(export_slots=8, import_slots=4)
    yield fixture
    fixture.close()


def export(blocks, *, seal=None, last_chance=False, req_id="r", key=KEY) -> Export:
    return Export(req_id, key, blocks, seal, last_chance)


def subscribe(block_ids, *, first_block=0, req_id="r", key=KEY) -> Subscribe:
    return Subscribe(req_id, key, first_block, block_ids, 7, "ab" * 32)


# Producing


def test_blocks_are_exported_as_planned_and_sealed(fixture: Fixture) -> None:
    fixture.step(exports=[export([(0, 5)])])
    fixture.step(exports=[export([(1, 2)], seal=SEAL, last_chance=True)])
    (sealed,) = fixture.told("sealed")
    assert (sealed["prompt_tokens"], sealed["prompt_digest"]) == (7, "ab" * 32)
    blocks = fixture.agent.handoff(NAME).blocks
    size = fixture.cache.block_bytes
    assert {i: b[:size] for i, b in blocks.items()} == {0: fixture.block(5), 1: fixture.block(2)}
    assert fixture.worker.report().seq == 2


def test_without_slots_blocks_wait_in_order_and_the_request_is_held(fixture: Fixture) -> None:
    fixture.agent.handoff(NAME).kept = True
    fixture.step(exports=[export([(i, i) for i in range(9)], seal=SEAL)])
    fixture.told("exported")
    assert sorted(fixture.agent.handoff(NAME).blocks) == list(range(6))
    assert fixture.worker.report().free_slots == 0
    fixture.step(export_ends=[ExportEnd("r", KEY, aborted=False, held=True)])
    assert fixture.sent == [] and not fixture.agent.seen("sealed")
    fixture.agent.release_all()
    fixture.step_until(lambda: fixture.sent, "the release of the held blocks")
    fixture.told("sealed")
    assert sorted(fixture.agent.handoff(NAME).blocks) == list(range(9))
    for _ in range(3):
        fixture.step()
    assert fixture.sent == ["r"], "once"
    fixture.agent.release_all()
    fixture.step_until(lambda: fixture.worker.report().free_slots == 6, "the slots")


@pytest.mark.parametrize("by", ["cancel", "detach", "abort"])
def test_held_blocks_are_given_up(fixture: Fixture, by: str) -> None:
    fixture.agent.handoff(NAME).kept = True
    fixture.step(exports=[export([(i, i) for i in range(9)], seal=SEAL)])
    if by == "abort":
        fixture.step(export_ends=[ExportEnd("r", KEY, aborted=True, held=False)])
        assert len(fixture.told("aborted")) == 1
        fixture.agent.release_all()
        fixture.step()
        assert fixture.sent == []
        return
    fixture.step(export_ends=[ExportEnd("r", KEY, aborted=False, held=True)])
    if by == "cancel":
        fixture.tell("cancel")
    else:
        fixture.agent.disconnect()
    fixture.step_until(lambda: fixture.sent == ["r"], "the release of the held blocks")
    assert not fixture.agent.seen("sealed") and not fixture.agent.seen("aborted")


def test_withdrawn_blocks_are_not_read_and_come_from_their_new_place(fixture: Fixture) -> None:
    fixture.agent.handoff(NAME).kept = True
    fixture.step(exports=[export([(i, i) for i in range(9)], seal=SEAL)])
    fixture.told("exported")
    fixture.step(withdrawn=["r"])
    fixture.agent.release_all()
    fixture.step()
    fixture.step_until(lambda: fixture.worker.report().free_slots == 6, "the slots")
    assert not fixture.agent.seen("sealed")
    moved = [(i, BLOCKS - 1 - i) for i in range(9)]
    fixture.step(exports=[export(moved, seal=SEAL, last_chance=True)])
    fixture.told("sealed")
    blocks = fixture.agent.handoff(NAME).blocks
    size = fixture.cache.block_bytes
    assert [blocks[i][:size] for i in range(9)] == [
        fixture.block(i if i < 6 else BLOCKS - 1 - i) for i in range(9)
    ]


def test_what_cannot_be_exported_at_its_last_chance_is_void(fixture: Fixture) -> None:
    fixture.agent.handoff(NAME).kept = True
    fixture.step(exports=[export([(i, i) for i in range(9)], seal=SEAL, last_chance=True)])
    fixture.told("aborted")
    fixture.agent.release_all()
    fixture.step(export_ends=[ExportEnd("r", KEY, aborted=False, held=False)])
    fixture.step()
    assert not fixture.agent.seen("sealed") and len(fixture.agent.seen("aborted")) == 1


def test_a_cancel_may_come_before_the_first_block(fixture: Fixture) -> None:
    fixture.tell("cancel")
    fixture.tell("cancel", OTHER_NAME)
    fixture.step_until(lambda: KEY in fixture.worker._exports._cancelled, "the cancel")
    fixture.step(exports=[export([(0, 0)], seal=SEAL, last_chance=True)])
    fixture.step(export_ends=[ExportEnd("q", OTHER_KEY, aborted=True, held=False)])
    fixture.step(exports=[export([(0, 0)], req_id="z", key=KEY._replace(generation=9))])
    fixture.agent.wait(lambda: fixture.agent.seen("exported"), "another's block")
    assert [m["generation"] for m in fixture.agent.messages] == [9]


# Layer group by layer group


@pytest.fixture
def in_groups() -> Iterator[Fixture]:
    """Of three layers, each a group of its own."""
    fixture = Fixture(layer_groups=3, export_slots=16, import_slots=4)
    yield fixture
    fixture.close()


def indices(fixture: Fixture) -> list[list[int]]:
    """As they were exported, message by message."""
    return [[block["index"] for block in m["blocks"]] for m in fixture.agent.seen("exported")]


def test_a_group_is_exported_before_the_step_ends(in_groups: Fixture) -> None:
    fixture, agent = in_groups, in_groups.agent
    plan = StepPlan(seq=1, exports=[export([(0, 5), (1, 2)], seal=SEAL, last_chance=True)])
    fixture.worker.before_forward(plan)
    for group, layer in enumerate(fixture.layers):
        # What is computed later is not there yet: only the group's own pages may be read now.
        later = [view for name, view in fixture.layers.items() if name > layer]
        kept = [view.clone() for view in later]
        for view in later:
            view.zero_()
        fixture.worker.layer_computed(plan, layer)
        fixture.worker.layer_computed(plan, layer)
        agent.wait(lambda: len(agent.seen("exported")) == group + 1, "the layer group")  # noqa: B023
        for view, right in zip(later, kept):
            view.copy_(right)
        assert not agent.seen("sealed"), "the step has not ended"
    fixture.worker.after_forward(plan)
    fixture.told("sealed")
    assert indices(fixture) == [[0, 3], [1, 4], [2, 5]]
    size = fixture.cache.block_bytes
    expected = {
        i * 3 + group: fixture.block(b, group) for i, b in ((0, 5), (1, 2)) for group in range(3)
    }
    assert {i: b[:size] for i, b in agent.handoff(NAME).blocks.items()} == expected
    assert fixture.worker.report().seq == 1


def test_what_no_layer_told_of_leaves_after_the_step(in_groups: Fixture) -> None:
    """As in a step that runs as one CUDA graph, and of layers that are none of the cache's."""
    fixture = in_groups
    fixture.seq = 1
    plan = StepPlan(seq=fixture.seq, exports=[export([(0, 5)])])
    fixture.worker.before_forward(plan)
    fixture.worker.layer_computed(plan, "l1")
    fixture.worker.layer_computed(plan, "unknown")
    fixture.worker.after_forward(plan)
    # Late for its step, and too early for the next.
    fixture.worker.layer_computed(plan, "l0")
    fixture.worker.layer_computed(StepPlan(seq=2, exports=plan.exports), "l0")
    fixture.step(exports=[export([(1, 2)], seal=SEAL, last_chance=True)])
    fixture.told("sealed")
    assert indices(fixture) == [[1], [0, 2], [3, 4, 5]]


def test_withdrawn_groups_come_again_from_where_they_stopped(in_groups: Fixture) -> None:
    fixture = in_groups
    fixture.agent.handoff(NAME).kept = True
    # Twelve slots for one handoff: of the last group nothing but two blocks finds room.
    fixture.step(exports=[export([(i, i) for i in range(5)])])
    fixture.told("exported")
    assert sum(map(len, indices(fixture))) == 12
    fixture.step(withdrawn=["r"])
    fixture.agent.release_all()
    fixture.step_until(lambda: fixture.worker.report().free_slots == 12, "the slots")
    moved = [(i, BLOCKS - 1 - i) for i in range(6)]
    fixture.agent.handoff(NAME).kept = False
    fixture.step(exports=[export(moved, seal=SEAL)])
    fixture.told("sealed")
    exported = [index for message in indices(fixture) for index in message]
    assert sorted(exported) == list(range(18)), "each once"
    for group in range(3):
        of_group = [index for index in exported if index % 3 == group]
        assert of_group == sorted(of_group)


def test_loads_land_in_their_layer_group(in_groups: Fixture) -> None:
    fixture, size = in_groups, in_groups.cache.block_bytes
    start_load(fixture, [4, 9], first_block=3)
    assert fixture.agent.seen("subscribe")[0]["first_block"] == 9
    for index in (10, 9, 13, 11, 12):
        give(fixture, index, 16, bytes([index]) * size)
        loaded = len(fixture.agent.seen("loaded")) + 1
        fixture.step_until(lambda: len(fixture.agent.seen("loaded")) == loaded, "it")  # noqa: B023
    fixture.tell("complete")
    fixture.step_until(lambda: fixture.received, "the end of the load")
    assert fixture.failed == ["r"], "a group of the last block did not come"
    for index in (9, 10, 11, 12, 13):
        block_id = 4 if index < 12 else 9
        assert fixture.block(block_id, index % 3) == bytes([index]) * size


class SlowCopier:
    """Copies as on a GPU: they end when they are let."""

    is_asynchronous = True

    def __init__(self) -> None:
        self.ended = threading.Event()

    def batch(self) -> AbstractContextManager[None]:
        return nullcontext()

    def ticket(self) -> "SlowCopier":
        return self

    def query(self) -> bool:
        return self.ended.is_set()

    def synchronize(self) -> None:
        self.ended.wait(PATIENCE_SECONDS)

    def fence(self) -> None:
        pass

    def drain(self) -> None:
        self.ended.set()


def test_copies_are_told_of_when_they_end_and_not_at_the_next_step() -> None:
    fixture = Fixture(layer_groups=3, export_slots=16, import_slots=4)
    copier = SlowCopier()
    fixture.worker._copier = fixture.worker._exports._copier = copier  # type: ignore[assignment]
    plan = StepPlan(seq=1, exports=[export([(0, 5)], seal=SEAL, last_chance=True)])
    fixture.worker.before_forward(plan)
    for layer in fixture.layers:
        fixture.worker.layer_computed(plan, layer)
    fixture.worker.after_forward(plan)
    assert not fixture.agent.messages, "they are still on their way"
    copier.ended.set()
    fixture.told("sealed")
    assert indices(fixture) == [[0], [1], [2]]
    fixture.close()


# Consuming


def start_load(fixture: Fixture, block_ids: list[int], **fields) -> None:
    fixture.agent.handoff(NAME).withheld = True
    fixture.step(subscribes=[subscribe(block_ids, **fields)])
    fixture.told("subscribe")


def give(fixture: Fixture, index: int, slot: int, data: bytes) -> None:
    fixture.agent.write_import(slot, data)
    crc32 = fixture.agent.checksum(slot)
    fixture.tell("load", blocks=[{"index": index, "slot": slot, "crc32": crc32}])


def test_blocks_are_loaded_to_where_they_belong(fixture: Fixture) -> None:
    start_load(fixture, [4, 9], first_block=3)
    subscribed = fixture.agent.seen("subscribe")[0]
    assert (subscribed["first_block"], subscribed["prompt_tokens"]) == (3, 7)
    old = fixture.block(3)
    size = fixture.cache.block_bytes
    give(fixture, 4, 10, b"\x01" * size)
    give(fixture, 3, 11, b"\x02" * size)
    fixture.step_until(lambda: len(fixture.agent.seen("loaded")) == 2, "the slots")
    assert [m["slots"] for m in fixture.agent.seen("loaded")] == [[10], [11]]
    assert fixture.received == []
    fixture.tell("complete")
    fixture.step_until(lambda: fixture.received, "the end of the load")
    assert (fixture.received, fixture.failed) == (["r"], [])
    assert fixture.block(4) == b"\x02" * size and fixture.block(9) == b"\x01" * size
    assert fixture.block(3) == old
    fixture.step(load_ends=["r"])
    assert not fixture.agent.seen("aborted") and fixture.received == ["r"]


@pytest.mark.parametrize("why", ["failed", "incomplete", "foreign block", "bad slot", "detach"])
def test_a_load_that_cannot_be_right_fails_once(fixture: Fixture, why: str) -> None:
    start_load(fixture, [4, 9])
    if why == "failed":
        fixture.tell("failed", reason="the prefill died")
    elif why == "incomplete":
        give(fixture, 0, 10, b"x")
        fixture.tell("complete")
    elif why == "foreign block":
        give(fixture, 2, 10, b"x")
    elif why == "bad slot":
        fixture.tell("load", blocks=[{"index": 0, "slot": 3}])
    else:
        fixture.agent.disconnect()
    fixture.step_until(lambda: fixture.received, "the end of the load")
    if why != "detach":
        fixture.tell("complete")
    for _ in range(5):
        fixture.step()
        time.sleep(0.002)
    assert fixture.received == fixture.failed == ["r"]


@pytest.mark.parametrize("byte", ["first", "middle", "last"])
def test_a_block_that_changed_in_the_arena_is_told_of_and_waits(
    fixture: Fixture, byte: str
) -> None:
    start_load(fixture, [4, 9])
    old, size = fixture.block(9), fixture.cache.block_bytes
    give(fixture, 0, 10, b"\x01" * size)
    data = bytearray(b"\x02" * size)
    fixture.agent.write_import(11, bytes(data))
    crc32 = fixture.agent.checksum(11)
    data[{"first": 0, "middle": size // 2, "last": size - 1}[byte]] ^= 0x40
    fixture.agent.write_import(11, bytes(data))
    fixture.tell("load", blocks=[{"index": 1, "slot": 11, "crc32": crc32}])
    fixture.step_until(lambda: len(fixture.agent.seen("loaded")) == 2, "the slots")
    assert [m["index"] for m in fixture.agent.seen("corrupt")] == [1]
    kinds = [m["type"] for m in fixture.agent.messages]
    assert kinds.index("corrupt") < len(kinds) - 1 - kinds[::-1].index("loaded"), "told first"
    assert fixture.block(9) == old, "nothing of it was copied"
    # It is for the worker to fail it, so that the request hears of it by one way only.
    assert fixture.received == []
    fixture.tell("failed", reason="block 1 changed")
    fixture.step_until(lambda: fixture.received, "the end of the load")
    assert fixture.received == fixture.failed == ["r"]


def test_a_corrupt_load_is_not_completed(fixture: Fixture) -> None:
    start_load(fixture, [4])
    fixture.tell("load", blocks=[{"index": 0, "slot": 10, "crc32": 1}])
    fixture.tell("complete")
    fixture.step_until(lambda: fixture.received, "the end of the load")
    assert fixture.received == fixture.failed == ["r"]


def test_an_aborted_load_touches_no_block_and_gives_its_slots_back(fixture: Fixture) -> None:
    start_load(fixture, [4, 9])
    old = fixture.block(4)
    fixture.agent.write_import(10, b"x" * fixture.cache.block_bytes)
    crc32 = fixture.agent.checksum(10)
    fixture.tell("load", blocks=[{"index": 0, "slot": 10, "crc32": crc32}])
    inbox = fixture.link.inbox
    deadline = time.monotonic() + PATIENCE_SECONDS
    while inbox.empty():
        assert time.monotonic() < deadline
    # The block is here already when the abort comes: they meet in one step.
    fixture.step(load_ends=["r"])
    assert fixture.received == ["r"] and fixture.failed == []
    assert fixture.block(4) == old
    assert fixture.told("loaded")[0]["slots"] == [10]
    assert len(fixture.told("aborted")) == 1
    fixture.tell("complete")
    fixture.step(load_ends=["r", "unknown"])
    assert fixture.received == ["r"] and len(fixture.agent.seen("aborted")) == 1


def test_a_consumer_without_a_handoff_or_a_worker_fails_at_once(fixture: Fixture) -> None:
    fixture.step(subscribes=[subscribe([1], key=None)])
    assert fixture.received == fixture.failed == ["r"]
    fixture.agent.close()
    fixture.step_until(lambda: fixture.worker._connection is None, "the end of the link")
    fixture.step(subscribes=[subscribe([1], req_id="q")])
    assert fixture.received == fixture.failed == ["r", "q"]


def test_notices_pass_as_they_are(fixture: Fixture) -> None:
    fixture.step(notices=[("not_needed", KEY), ("aborted", OTHER_KEY)])
    notice = {"type": "not_needed", "handoff": NAME[0], "generation": 0}
    assert fixture.told("not_needed") == [notice]
    fixture.told("aborted", OTHER_NAME)


# Loading where blocks lie


def map_peer(fixture: Fixture) -> None:
    fixture.agent.map_peer()
    fixture.step_until(lambda: fixture.agent.answers_about(PEER), "the answer")
    assert fixture.agent.answers_about(PEER) == [{"type": "mapped", "arena": PEER}]


def leave_there(fixture: Fixture, index: int, slot: int, data: bytes, arena: object = PEER) -> None:
    offset = fixture.agent.write_peer(slot, data)
    fixture.agent._peer_slot_of[NAME, index] = slot
    block = {"index": index, "offset": offset, "crc32": zlib.crc32(data)}
    fixture.tell("load_mapped", arena=arena, blocks=[block])


def test_blocks_are_loaded_where_they_lie(fixture: Fixture) -> None:
    map_peer(fixture)
    # The mapping outlives the file, as that of a worker that is gone.
    os.unlink(fixture.agent.peer_path)
    start_load(fixture, [4, 9], first_block=3)
    size = fixture.cache.block_bytes
    leave_there(fixture, 4, PEER_SLOTS - 1, b"\x01" * size)
    leave_there(fixture, 3, 0, b"\x02" * size)
    fixture.step_until(lambda: len(fixture.agent.seen("loaded_mapped")) == 2, "the blocks")
    assert [m["indices"] for m in fixture.agent.seen("loaded_mapped")] == [[4], [3]]
    assert fixture.received == []
    fixture.tell("complete")
    fixture.step_until(lambda: fixture.received, "the end of the load")
    assert (fixture.received, fixture.failed) == (["r"], [])
    assert fixture.block(4) == b"\x02" * size and fixture.block(9) == b"\x01" * size
    assert not fixture.agent.seen("loaded")


def test_a_block_that_was_overwritten_where_it_lies_is_told_of(fixture: Fixture) -> None:
    map_peer(fixture)
    start_load(fixture, [4, 9])
    old, size = fixture.block(9), fixture.cache.block_bytes
    offset = fixture.agent.write_peer(5, b"\x01" * size)
    crc32 = zlib.crc32(b"\x01" * size)
    fixture.agent.write_peer(5, b"\x03" * size)
    fixture.agent._peer_slot_of[NAME, 1] = 5
    block = {"index": 1, "offset": offset, "crc32": crc32}
    fixture.tell("load_mapped", arena=PEER, blocks=[block])
    fixture.step_until(lambda: fixture.agent.seen("loaded_mapped"), "the block")
    assert [m["index"] for m in fixture.agent.seen("corrupt")] == [1]
    assert fixture.block(9) == old and fixture.received == []
    fixture.tell("failed", reason="block 1 changed")
    fixture.step_until(lambda: fixture.received, "the end of the load")
    assert fixture.received == fixture.failed == ["r"]


def test_blocks_of_a_load_that_is_gone_come_back_unread(fixture: Fixture) -> None:
    map_peer(fixture)
    start_load(fixture, [4])
    old = fixture.block(4)
    fixture.step(load_ends=["r"])
    leave_there(fixture, 0, 0, b"\x01" * fixture.cache.block_bytes)
    fixture.step_until(lambda: fixture.agent.seen("loaded_mapped"), "the block")
    assert fixture.block(4) == old and fixture.received == ["r"]


@pytest.mark.parametrize("why", ["unmapped", "unknown", "beyond", "no offset"])
def test_a_block_that_lies_nowhere_fails_its_load(fixture: Fixture, why: str) -> None:
    map_peer(fixture)
    start_load(fixture, [4])
    data = b"\x01" * fixture.cache.block_bytes
    if why == "unmapped":
        fixture.agent.send({"type": "unmap", "arena": PEER})
        leave_there(fixture, 0, 0, data)
    elif why == "unknown":
        leave_there(fixture, 0, 0, data, arena=PEER + 1)
    else:
        end = fixture.agent.peer_file()["len_bytes"]
        offset = "0" if why == "no offset" else end - len(data) + 1
        fixture.agent._peer_slot_of[NAME, 0] = 0
        block = {"index": 0, "offset": offset, "crc32": zlib.crc32(data)}
        fixture.tell("load_mapped", arena=PEER, blocks=[block])
    fixture.step_until(lambda: fixture.received, "the end of the load")
    assert fixture.received == fixture.failed == ["r"]


@pytest.mark.parametrize("why", ["another", "open to all", "a link", "short", "no file", "gone"])
def test_only_what_was_meant_is_mapped(fixture: Fixture, why: str) -> None:
    map_peer(fixture)
    file = fixture.agent.peer_file()
    if why == "another":
        file["inode"] += 1
    elif why == "open to all":
        os.chmod(file["path"], 0o640)
    elif why == "a link":
        os.symlink(file["path"], file["path"] + ".link")
        file["path"] += ".link"
    elif why == "short":
        file["len_bytes"] += 1
    elif why == "no file":
        file["path"] = fixture.agent.directory
    else:
        os.unlink(file["path"])
    fixture.agent.send({"type": "map", "arena": 5, "file": file})
    fixture.step_until(lambda: fixture.agent.answers_about(5), "the answer")
    assert fixture.agent.answers_about(5)[0]["refused"]
    # What was mapped before still is.
    start_load(fixture, [4])
    leave_there(fixture, 0, 0, b"\x01" * fixture.cache.block_bytes)
    fixture.step_until(lambda: fixture.agent.seen("loaded_mapped"), "the block")
    assert not fixture.received


# The link


def test_after_a_break_a_new_arena_is_used(fixture: Fixture) -> None:
    fixture.agent.handoff(NAME).kept = True
    fixture.step(exports=[export([(0, 0)])])
    fixture.told("exported")
    fixture.agent.disconnect()
    fixture.agent.wait(lambda: fixture.agent.attachments == 2, "the second attachment")
    fixture.step_until(lambda: fixture.worker.report().free_slots == 6, "the new arena")
    fixture.step(exports=[export([(1, 1)], seal=SEAL, last_chance=True)])
    fixture.step(exports=[export([(0, 3)], req_id="q", key=OTHER_KEY)])
    fixture.told("exported", OTHER_NAME)
    assert list(fixture.agent.handoff(NAME).blocks) == [0], "its first block is gone for good"
    fixture.step(export_ends=[ExportEnd("r", KEY, aborted=False, held=False)])
    fixture.told("aborted")
    assert not fixture.agent.seen("sealed")


@pytest.mark.parametrize(
    "message",
    [
        {"type": "unheard of"},
        {"type": "load", "handoff": "x", "generation": 0, "blocks": []},
        {"type": "load", "handoff": NAME[0], "generation": 0, "blocks": [7]},
        {"type": "release"},
        {"type": "release", "slots": 7},
        {"type": "map", "arena": 1},
        {"type": "map", "arena": "1", "file": {"path": "/x"}},
        {"type": "load_mapped", "handoff": NAME[0], "generation": 0, "arena": 1, "blocks": [{}]},
    ],
)
def test_nonsense_ends_the_connection_and_not_the_engine(fixture: Fixture, message) -> None:
    fixture.step()
    fixture.agent.send(message)
    fixture.step_until(lambda: fixture.agent.attachments == 2, "the second attachment")


def test_an_engine_that_is_refused_does_not_start() -> None:
    with pytest.raises(Refused, match="another model"):
        Fixture(refuse="it has another model")


def test_an_arena_with_slots_too_small_is_refused() -> None:
    agent = Agent()
    small = {
        "compatibility": {"block_bytes": 4096, "block_size_tokens": 4, "layer_groups": 1}
    }
    with pytest.raises(ArenaError, match="cannot hold"):
        Link(agent.path, small, block_bytes=4097).start()
    agent.close()


def test_the_worker_may_start_later(tmp_path, monkeypatch) -> None:
    path = str(tmp_path / "kv.sock")
    late = Link(path, {"compatibility": {"block_bytes": 64, "block_size_tokens": 4}}, 64)
    agents: list[Agent] = []

    def start_worker(_seconds: float) -> None:
        if not agents:
            agents.append(Agent(path=path))

    monkeypatch.setattr(link_module.time, "sleep", start_worker)
    late.start()
    late.stop()
    agents[0].close()

    monkeypatch.setattr(link_module, "FIRST_ATTACH_SECONDS", 0.0)
    with pytest.raises(TimeoutError, match="no worker"):
        Link(str(tmp_path / "none.sock"), {}, 64).start()
