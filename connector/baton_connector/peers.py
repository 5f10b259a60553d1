"""Other workers' arenas on this host, mapped for reading: blocks are copied into the paged cache from
where they lie there.

A peer may take a block back and write there at any time. The worker hears of that: what was copied of
such a block is not told to be complete.
"""

import mmap
import os
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .arena import ArenaError

_READ_ONLY_AND_PORTABLE = 0x08 | 0x01
"""cudaHostRegisterReadOnly and cudaHostRegisterPortable."""


class PeerArena:
    def __init__(self, path: str, device: int, inode: int, length: int) -> None:
        """Raises ``ArenaError`` where it is not the file that was named, or not this user's alone."""
        try:
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            fd = os.open(path, flags)
            try:
                _check(os.fstat(fd), device, inode, length)
                # Populated: no step pays for a first touch.
                shared = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
                mapping = mmap.mmap(fd, length, flags=shared, prot=mmap.PROT_READ)
            finally:
                os.close(fd)
        except (OSError, OverflowError, ValueError) as error:
            raise ArenaError(f"cannot map a peer's arena: {error}") from error
        with warnings.catch_warnings():
            # That nobody can write there is as it shall be.
            warnings.simplefilter("ignore", UserWarning)
            self._bytes = torch.frombuffer(mapping, dtype=torch.uint8)
        self._is_pinned = False

    def block(self, offset: object, length: int) -> torch.Tensor | None:
        """What lies there, not copied; ``None`` where that is not all in it."""
        if type(offset) is not int or not 0 <= offset <= self._bytes.numel() - length:
            return None
        return self._bytes[offset : offset + length]

    def pin(self) -> None:
        """Registers it with CUDA. Raises ``ArenaError`` where the device cannot take what is mapped for
        reading: copies out of it would then be slower than out of the arena that is pinned."""
        address, length = self._bytes.data_ptr(), self._bytes.numel()
        error = torch.cuda.cudart().cudaHostRegister(address, length, _READ_ONLY_AND_PORTABLE)
        if int(error) != 0:
            raise ArenaError(f"cudaHostRegister of a peer's arena failed with error {int(error)}")
        self._is_pinned = True

    def unpin(self) -> None:
        if self._is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
            self._is_pinned = False


def _check(found: os.stat_result, device: int, inode: int, length: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ArenaError("a peer's arena is not a regular file")
    if (found.st_dev, found.st_ino) != (device, inode):
        raise ArenaError("a peer's arena is another file by now")
    if found.st_uid != os.geteuid():
        raise ArenaError("a peer's arena is another user's")
    if found.st_mode & 0o077:
        raise ArenaError("others than its owner may open a peer's arena")
    if found.st_size < length:
        raise ArenaError("a peer's arena is shorter than its slots")


@dataclass(slots=True)
class PeerMapped:
    """The worker had a peer's arena mapped, or tried to."""

    number: int
    arena: PeerArena | None
    refused: str = ""


def map_peer(message: dict[str, Any]) -> PeerMapped:
    """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where ``message`` names no file."""
    number, file = message["arena"], message["file"]
    path, numbers = file["path"], [file[key] for key in ("device", "inode", "len_bytes")]
    if not isinstance(path, str) or any(type(n) is not int or n < 0 for n in (number, *numbers)):
        raise ValueError("it names no file")
    try:
        return PeerMapped(number, PeerArena(path, *numbers))
    except ArenaError as error:
        return PeerMapped(number, None, str(error))


class Peers:
    """Those that are mapped, by the worker's numbers."""

    def __init__(self, pins: bool, send: Callable[[dict[str, Any]], None]) -> None:
        self._pins = pins
        self._send = send
        self._arenas: dict[int, PeerArena] = {}

    def add(self, mapped: PeerMapped) -> None:
        arena, refused = mapped.arena, mapped.refused
        if arena is not None and self._pins:
            try:
                arena.pin()
            except ArenaError as error:
                arena, refused = None, str(error)
        answer: dict[str, Any] = {"type": "mapped", "arena": mapped.number}
        if arena is None:
            answer["refused"] = refused
        else:
            self._arenas[mapped.number] = arena
        self._send(answer)

    def get(self, number: object) -> PeerArena | None:
        return self._arenas.get(number) if type(number) is int else None

    def remove(self, number: object) -> None:
        if (arena := self.get(number)) is not None:
            arena.unpin()
            del self._arenas[number]  # type: ignore[arg-type]

    def clear(self) -> None:
        for number in list(self._arenas):
            self.remove(number)
