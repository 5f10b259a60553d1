"""The connection to the worker: made again whenever it breaks, each time with a new arena.

A thread connects, shakes hands and reads. Whatever comes is put into an inbox, in order, for the
model's thread: :class:`Attached`, the messages of that connection, :class:`Detached`. Replies go
through the :class:`Connection` that they belong to, so nothing about an old arena can reach a new
worker.
"""

import queue
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vllm.logger import init_logger

from . import frames
from .arena import Arena, ArenaError
from .peers import PeerMapped, map_peer

logger = init_logger("vllm.baton_connector.link")

PROTOCOL = 5
FIRST_ATTACH_SECONDS = 60.0
"""The worker may start later than vLLM."""
HANDSHAKE_SECONDS = 60.0
"""The worker touches every page of the arena before it answers."""
SEND_SECONDS = 5
"""A worker that reads nothing for so long is as good as gone; the model must not wait for it."""
_BACKOFF_SECONDS = (0.05, 2.0)


class Refused(Exception):
    """The worker does not want this engine."""


class Connection:
    """One connection, welcomed and with its arena."""

    def __init__(self, sock: socket.socket, arena: Arena) -> None:
        self._socket = sock
        self._lock = threading.Lock()
        self.arena = arena

    def send(self, message: dict[str, Any]) -> None:
        """Never raises: a connection that fails is closed, and its reader tells."""
        try:
            with self._lock:
                self._socket.sendall(frames.encode(message))
        except (OSError, frames.FrameError) as error:
            logger.warning("cannot send to the worker: %s", error)
            self.close()

    def close(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # Closed already.


@dataclass(slots=True)
class Attached:
    connection: Connection


@dataclass(slots=True)
class Detached:
    connection: Connection


@dataclass(slots=True)
class Received:
    message: dict[str, Any]


Event = Attached | Detached | Received | PeerMapped


class Link:
    def __init__(self, path: str, hello: dict[str, Any], block_bytes: int) -> None:
        self._path = path
        self._hello = {"type": "hello", "protocol": PROTOCOL, **hello}
        self._block_bytes = block_bytes
        self._stopping = threading.Event()
        self._current: Connection | None = None
        self.inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def start(self) -> None:
        """Attaches for the first time, then keeps attached in the background. Raises where the
        worker refuses, offers no usable arena or does not listen within a minute."""
        deadline = time.monotonic() + FIRST_ATTACH_SECONDS
        for delay in backoff():
            try:
                first = self._attach()
                break
            except (OSError, frames.FrameError) as error:
                if time.monotonic() + delay > deadline:
                    raise TimeoutError(
                        f"no worker at {self._path} within {FIRST_ATTACH_SECONDS:.0f} s: {error}"
                    ) from error
                time.sleep(delay)
        threading.Thread(
            target=self._keep_attached, args=(first,), name="baton-link", daemon=True
        ).start()

    def stop(self) -> None:
        self._stopping.set()
        if self._current is not None:
            self._current.close()

    def drain(self) -> list[Event]:
        events: list[Event] = []
        while True:
            try:
                events.append(self.inbox.get_nowait())
            except queue.Empty:
                return events

    def _attach(self) -> Connection:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(HANDSHAKE_SECONDS)
            sock.connect(self._path)
            sock.sendall(frames.encode(self._hello))
            arena = self._welcomed(frames.receive(sock))
            sock.settimeout(None)
            limit_sends(sock)
        except BaseException:
            sock.close()
            raise
        self._current = Connection(sock, arena)
        self.inbox.put(Attached(self._current))
        return self._current

    def _welcomed(self, answer: dict[str, Any] | None) -> Arena:
        if answer is None:
            raise frames.FrameError("the worker closed without a word")
        if answer["type"] == "refused":
            raise Refused(f"the worker refused this engine: {answer.get('reason')}")
        if answer["type"] != "welcome" or answer.get("protocol") != PROTOCOL:
            raise Refused("the worker speaks another protocol")
        try:
            arena = Arena(
                str(answer["arena"]),
                int(answer["slot_bytes"]),
                _slots(answer, "export"),
                _slots(answer, "import"),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise Refused("the worker's welcome is malformed") from error
        if arena.slot_bytes < self._block_bytes:
            raise ArenaError(
                f"a slot of {arena.slot_bytes} bytes cannot hold a block of {self._block_bytes}"
            )
        return arena

    def _keep_attached(self, connection: Connection) -> None:
        while True:
            reason = self._read(connection)
            self.inbox.put(Detached(connection))
            if self._stopping.is_set():
                return
            logger.warning("the worker's connection ended (%s); attaching again", reason)
            for delay in backoff():
                if self._stopping.wait(delay):
                    return
                try:
                    connection = self._attach()
                    break
                except (Refused, ArenaError) as error:
                    logger.error("cannot attach to the worker: %s", error)
                except (OSError, frames.FrameError):
                    pass  # Not there yet.
            logger.info("attached to the worker again")

    def _read(self, connection: Connection) -> str:
        try:
            while (message := frames.receive(connection._socket)) is not None:
                self.inbox.put(arrived(message))
            return "closed by the worker"
        except (OSError, frames.FrameError) as error:
            return str(error)
        finally:
            connection.close()


def arrived(message: dict[str, Any]) -> Event:
    """Another worker's arena is mapped here, and not on the model's thread: it touches every page."""
    if message["type"] != "map":
        return Received(message)
    try:
        return map_peer(message)
    except (KeyError, TypeError, ValueError) as error:
        raise frames.FrameError(f"a message that names no arena: {error!r}") from error


def _slots(welcome: dict[str, Any], half: str) -> range:
    first = int(welcome[f"first_{half}_slot"])
    return range(first, first + int(welcome[f"{half}_slots"]))


def limit_sends(sock: socket.socket) -> None:
    timeout = struct.pack("@ll", SEND_SECONDS, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)


def backoff() -> Iterator[float]:
    """Seconds to wait, without end."""
    delay, longest = _BACKOFF_SECONDS
    while True:
        yield delay
        delay = min(2 * delay, longest)
