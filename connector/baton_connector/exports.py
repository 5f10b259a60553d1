"""The producing half in a worker process: blocks on their way from the paged cache into the arena.

Blocks are copied right after the forward that completed them, or each layer group of them while the
forward computes the next, so vLLM may free them at once. Only where export slots ran out do they wait
here, and then vLLM holds them: see ``Export.last_chance`` and ``ExportEnd.held``.

Of several layer groups, group ``g`` of the prompt's block ``b`` goes by the index ``b * groups + g``,
as a block of its own. Those of each group are exported in their order.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vllm.logger import init_logger

from .arena import Arena, ExportSlots
from .handoff import HandoffKey, RecentHandoffs
from .layout import Copier, PagedCache
from .plan import Export, ExportEnd, Seal

logger = init_logger("vllm.baton_connector.exports")

Later = Callable[[Callable[[], None]], None]
"""Has something done once the copies made so far have ended."""


@dataclass(slots=True)
class _Exporting:
    key: HandoffKey
    next_block: list[int]
    """Of each layer group: the prompt's blocks before it are exported or pending."""
    pending: deque[tuple[int, int, int]] = field(default_factory=deque)
    """Each as (position in the prompt, layer group, block id)."""
    seal: Seal | None = None
    sealed: bool = False
    void: bool = False
    """Cancelled or lost: nothing more of it is exported."""
    told: bool = False
    """The worker knows that it is void."""
    held: bool = False
    last_chance: bool = False


class Exports:
    def __init__(
        self,
        cache: PagedCache,
        copier: Copier,
        send: Callable[[str, HandoffKey, dict[str, Any]], None],
        later: Later,
    ) -> None:
        self._cache = cache
        self._copier = copier
        self._send = send
        self._later = later
        self._arena: Arena | None = None
        self._slots = ExportSlots(range(0))
        self._exporting: dict[str, _Exporting] = {}
        self._cancelled = RecentHandoffs()
        self._sent: set[str] = set()

    def attached(self, arena: Arena) -> None:
        self._arena = arena
        self._slots = ExportSlots(arena.exports)

    def detached(self) -> None:
        """Nobody is left who has the first blocks of what was being exported."""
        self._arena = None
        self._slots = ExportSlots(range(0))
        for exporting in self._exporting.values():
            self._make_void(exporting)
            exporting.told = False

    def withdraw(self, req_id: str) -> None:
        if exporting := self._exporting.get(req_id):
            while exporting.pending:
                position, group, _ = exporting.pending.pop()
                exporting.next_block[group] = position
            if not exporting.sealed:
                exporting.seal = None
            exporting.last_chance = False

    def end(self, end: ExportEnd) -> None:
        exporting = self._exporting.get(end.req_id)
        told = exporting.told if exporting else end.key in self._cancelled
        lost = exporting is not None and exporting.void
        if (end.aborted or lost) and not told:
            self._send("aborted", end.key, {})
        if end.held and exporting is not None and exporting.pending:
            exporting.held = True
        elif end.held:
            self._finish(end.req_id)
        else:
            self._exporting.pop(end.req_id, None)

    def add(self, export: Export, group: int) -> None:
        """This layer group of the blocks is computed."""
        exporting = self._exporting.get(export.req_id)
        if exporting is None:
            nothing = [0] * self._cache.layer_groups
            exporting = self._exporting[export.req_id] = _Exporting(export.key, nothing)
            if export.key in self._cancelled:
                exporting.void = exporting.told = True
            elif self._arena is None:
                exporting.void = True
        if exporting.void or exporting.sealed:
            return
        for position, block_id in export.blocks:
            if position >= exporting.next_block[group]:
                exporting.pending.append((position, group, block_id))
                exporting.next_block[group] = position + 1

    def close(self, export: Export) -> None:
        """All layer groups of the blocks are computed."""
        exporting = self._exporting.get(export.req_id)
        if exporting is not None and not (exporting.void or exporting.sealed):
            exporting.seal = export.seal
            exporting.last_chance = export.last_chance

    def release(self, slots: list[Any]) -> None:
        for slot in slots:
            if not self._slots.release(slot):
                logger.warning("the worker released slot %s, which it did not have", slot)

    def cancel(self, key: HandoffKey) -> None:
        self._cancelled.add(key)
        for exporting in self._exporting.values():
            if exporting.key == key:
                self._make_void(exporting)
                exporting.told = True

    def pump(self) -> None:
        """Copies what there are slots for, oldest request first."""
        for req_id, exporting in list(self._exporting.items()):
            if exporting.pending:
                self._copy(exporting)
            if exporting.pending and exporting.last_chance:
                # The worker came back with fewer slots than the scheduler counted on.
                self._make_void(exporting)
                self._send("aborted", exporting.key, {})
                exporting.told = True
            if exporting.seal is not None and not exporting.pending and not exporting.sealed:
                exporting.sealed = True
                self._announce_seal(exporting.key, exporting.seal)
            if exporting.held and not exporting.pending:
                self._finish(req_id)

    def take_sent(self) -> set[str]:
        """Requests whose held blocks vLLM may free."""
        sent, self._sent = self._sent, set()
        return sent

    @property
    def free_slots(self) -> int:
        """Zero while blocks are waiting: they come first."""
        waiting = any(exporting.pending for exporting in self._exporting.values())
        return 0 if waiting else self._slots.open_to_all

    def _copy(self, exporting: _Exporting) -> None:
        assert self._arena is not None
        copied = []
        with self._copier.batch():
            while exporting.pending and (slot := self._slots.take(exporting.key)) is not None:
                position, group, block_id = exporting.pending.popleft()
                self._cache.copy_out(block_id, self._arena.slot(slot), group)
                index = position * self._cache.layer_groups + group
                copied.append({"index": index, "slot": slot})
        if copied:
            self._later(lambda: self._send("exported", exporting.key, {"blocks": copied}))

    def _announce_seal(self, key: HandoffKey, seal: Seal) -> None:
        fields = {
            "prompt_tokens": seal.prompt_tokens,
            "prompt_digest": seal.prompt_digest,
            "cached_tokens": seal.cached_tokens,
        }
        self._later(lambda: self._send("sealed", key, fields))

    def _finish(self, req_id: str) -> None:
        self._exporting.pop(req_id, None)
        self._later(lambda: self._sent.add(req_id))

    def _make_void(self, exporting: _Exporting) -> None:
        exporting.void = True
        exporting.pending.clear()
        exporting.seal = None
