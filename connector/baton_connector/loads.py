"""The consuming half in a worker process: blocks on their way into the paged cache, from the arena or
from where they lie in a peer's.

Why an abort cannot make a copy land in blocks that are another request's by then:

- A request that waits for KV keeps its blocks, aborted or not, until this half reports it as
  received (vLLM: ``WAITING_FOR_REMOTE_KVS``, ``delay_free_blocks``). It is reported exactly once.
- Copies are made only for a load that is ``live``, on the model's thread; the abort, which comes
  with a step's plan on that same thread, ends the load before any later copy could begin.
- It is reported only when none of its copies is on its way (``in_flight``; on a CPU none ever is
  between two calls). So vLLM frees the blocks after the last copy, and gives them to another
  request in a later step than that.
- Messages of the worker for a load that is gone find no load: they touch no memory. Its slots are
  answered with ``loaded`` all the same, so each slot of each ``load`` comes back exactly once, and
  each block of each ``load_mapped`` likewise with ``loaded_mapped``.
"""

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.logger import init_logger

from .arena import Arena
from .exports import Later
from .handoff import HandoffKey
from .layout import Copier, PagedCache
from .peers import Peers
from .plan import Subscribe

logger = init_logger("vllm.baton_connector.loads")


@dataclass(slots=True)
class _Load:
    req_id: str
    key: HandoffKey | None
    first_block: int
    block_ids: list[int]
    missing: set[int] = field(default_factory=set)
    """Counted from the first that is not cached, each layer group for itself."""
    in_flight: int = 0
    spoiled: bool = False
    """What lay in the arena was not what the worker verified: the worker is about to fail it."""
    live: bool = True
    complete: bool = False
    failed: bool = False


class Loads:
    def __init__(
        self,
        cache: PagedCache,
        copier: Copier,
        peers: Peers,
        send: Callable[[str, HandoffKey, dict[str, Any]], None],
        later: Later,
    ) -> None:
        self._cache = cache
        self._copier = copier
        self._peers = peers
        self._send = send
        self._later = later
        self._arena: Arena | None = None
        self._by_request: dict[str, _Load] = {}
        self._by_key: dict[HandoffKey, _Load] = {}

    def attached(self, arena: Arena) -> None:
        self._arena = arena

    def detached(self) -> None:
        self._arena = None
        for load in self._by_request.values():
            self._fail(load, "the worker is gone")

    def subscribe(self, plan: Subscribe) -> None:
        load = _Load(plan.req_id, plan.key, plan.first_block, plan.block_ids)
        load.missing = set(range(len(plan.block_ids) * self._cache.layer_groups))
        self._by_request[plan.req_id] = load
        if plan.key is None:
            self._fail(load, "it names no handoff that could be loaded")
        elif self._arena is None:
            self._fail(load, "no worker is attached")
        else:
            self._by_key[plan.key] = load
            fields = {
                "prompt_tokens": plan.prompt_tokens,
                "prompt_digest": plan.prompt_digest,
                "first_block": plan.first_block * self._cache.layer_groups,
            }
            self._send("subscribe", plan.key, fields)

    def abort(self, req_id: str) -> None:
        load = self._by_request.get(req_id)
        if load is not None and load.live:
            self._end(load)
            if load.key is not None:
                self._send("aborted", load.key, {})

    def load(self, key: HandoffKey, blocks: list[dict[str, Any]]) -> None:
        slots = [block["slot"] for block in blocks]
        self._take(key, blocks, map(self._in_slot, slots), "loaded", {"slots": slots})

    def load_mapped(self, key: HandoffKey, peer: object, blocks: list[dict[str, Any]]) -> None:
        arena, size = self._peers.get(peer), self._cache.block_bytes
        offsets = [block["offset"] for block in blocks]
        views = (None if arena is None else arena.block(offset, size) for offset in offsets)
        indices = [block["index"] for block in blocks]
        self._take(key, blocks, views, "loaded_mapped", {"indices": indices})

    def complete(self, key: HandoffKey) -> None:
        load = self._by_key.get(key)
        if load is None:
            return
        if load.spoiled:
            self._fail(load, "one of its blocks was corrupt")
            return
        if load.missing:
            self._fail(load, f"{len(load.missing)} of its blocks did not come")
            return
        load.complete = True
        self._end(load)

    def failed(self, key: HandoffKey, reason: str) -> None:
        if (load := self._by_key.get(key)) is not None:
            self._fail(load, reason)

    def take_received(self) -> tuple[set[str], set[str]]:
        """Requests that wait no longer, and which of them vLLM must fail."""
        ended = [d for d in self._by_request.values() if not d.live and not d.in_flight]
        for load in ended:
            del self._by_request[load.req_id]
        return {d.req_id for d in ended}, {d.req_id for d in ended if d.failed}

    def _in_slot(self, slot: object) -> torch.Tensor | None:
        arena = self._arena
        assert arena is not None
        if not arena.is_import(slot):
            return None
        return arena.slot(slot)[: self._cache.block_bytes]  # type: ignore[arg-type]

    def _take(
        self,
        key: HandoffKey,
        blocks: list[dict[str, Any]],
        views: Iterable[torch.Tensor | None],
        done: str,
        fields: dict[str, Any],
    ) -> None:
        """Copies blocks in, and says that it is done with where they lay when the copies have ended."""
        load = self._by_key.get(key)
        if load is not None:
            self._copy(load, blocks, views)
            load.in_flight += 1
        self._later(lambda: self._loaded(load, key, done, fields))

    def _copy(
        self, load: _Load, blocks: list[dict[str, Any]], views: Iterable[torch.Tensor | None]
    ) -> None:
        assert load.key is not None
        if load.spoiled:
            return
        with self._copier.batch():
            groups = self._cache.layer_groups
            for block, view in zip(blocks, views):
                index = block["index"]
                position = index - load.first_block * groups if type(index) is int else -1
                if view is None or not 0 <= position < len(load.block_ids) * groups:
                    self._fail(load, "the worker sent a block that does not belong to it")
                    return
                if zlib.crc32(view.numpy()) != block["crc32"]:
                    load.spoiled = True
                    self._send("corrupt", load.key, {"index": index})
                    return
                at, group = divmod(position, groups)
                self._cache.copy_in(view, load.block_ids[at], group)
                load.missing.discard(position)

    def _loaded(
        self, load: _Load | None, key: HandoffKey, kind: str, fields: dict[str, Any]
    ) -> None:
        if load is not None:
            load.in_flight -= 1
        self._send(kind, key, fields)

    def _fail(self, load: _Load, reason: str) -> None:
        if not load.live:
            return
        load.failed = True
        self._end(load)
        logger.warning("request %s: its KV will not come: %s", load.req_id, reason)

    def _end(self, load: _Load) -> None:
        load.live = False
        if load.key is not None:
            self._by_key.pop(load.key, None)
