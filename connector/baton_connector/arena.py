"""The staging arena: a file of equal slots that the worker process maps too.

It is the file of all of the engine's ranks. Of its export slots, which come first and are filled
here, and of its import slots, which the worker fills, a range is this rank's. A slot has one writer
at a time and passes to the other process by a message, never by what lies in it.
"""

import mmap
import os
from collections import deque

import torch

from .handoff import HandoffKey


class ArenaError(Exception):
    """The arena that the worker offers cannot be used."""


class Arena:
    def __init__(self, path: str, slot_bytes: int, exports: range, imports: range) -> None:
        total = slot_bytes * max(exports.stop, imports.stop)
        if slot_bytes <= 0 or min(exports.start, imports.start) < 0 or not (exports or imports):
            raise ArenaError("the arena is empty")
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                if os.fstat(fd).st_size < total:
                    raise ArenaError("the arena's file is shorter than its slots")
                # Populated: no handoff pays for a first touch.
                flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
                mapping = mmap.mmap(fd, total, flags=flags)
            finally:
                os.close(fd)
        except OSError as error:
            raise ArenaError(f"cannot map the arena: {error}") from error
        self.slot_bytes = slot_bytes
        self.exports = exports
        self.imports = imports
        # The tensor keeps the mapping alive, also after the worker has removed the file.
        self._slots = torch.frombuffer(mapping, dtype=torch.uint8).view(-1, slot_bytes)
        self._pinned: list[torch.Tensor] = []

    def slot(self, slot: int) -> torch.Tensor:
        """The bytes of one slot, not copied."""
        return self._slots[slot]

    def is_import(self, slot: object) -> bool:
        return type(slot) is int and slot in self.imports

    def pin(self) -> None:
        """Registers this rank's slots with CUDA, so that copies to and from the device need no
        staging."""
        for slots in (self.exports, self.imports):
            part = self._slots[slots.start : slots.stop]
            if part.numel() == 0:
                continue
            error = torch.cuda.cudart().cudaHostRegister(part.data_ptr(), part.numel(), 0)
            if int(error) != 0:
                self.unpin()
                raise ArenaError(f"cudaHostRegister failed with error {int(error)}")
            self._pinned.append(part)

    def unpin(self) -> None:
        while self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.pop().data_ptr())


class ExportSlots:
    """The export slots and which handoff has each.

    A quarter of them is kept for handoffs that have none. Otherwise a handoff whose consumer waits
    in its engine's queue could hold all slots, while the consumer ahead of it in that queue waits
    for blocks of this same producer: neither would ever move.
    """

    def __init__(self, slots: range) -> None:
        self._free = deque(slots)
        self._owner: dict[int, HandoffKey] = {}
        self._owned: dict[HandoffKey, int] = {}
        self._kept_back = len(slots) // 4

    def take(self, key: HandoffKey) -> int | None:
        owned = self._owned.get(key, 0)
        if not self._free or (owned and len(self._free) <= self._kept_back):
            return None
        slot = self._free.popleft()
        self._owner[slot] = key
        self._owned[key] = owned + 1
        return slot

    def release(self, slot: int) -> bool:
        """False where the slot was not taken."""
        key = self._owner.pop(slot, None)
        if key is None:
            return False
        self._free.append(slot)
        self._owned[key] -= 1
        if not self._owned[key]:
            del self._owned[key]
        return True

    @property
    def open_to_all(self) -> int:
        """Slots that even a handoff which has some could take now."""
        return max(0, len(self._free) - self._kept_back)
