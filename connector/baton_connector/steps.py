"""The scheduler's own connection to the worker: steps as they were go up, the pace comes down.

Two threads of its own speak to the worker, so that no step waits for it. Without a worker no step is
told of, and there is no pace.
"""

import queue
import socket
import threading
import time
from dataclasses import asdict, dataclass

from vllm.logger import init_logger

from . import frames
from .link import HANDSHAKE_SECONDS, PROTOCOL, Refused, backoff, limit_sends
from .pacing import Pace

logger = init_logger("vllm.baton_connector.steps")

BATCH_SECONDS = 0.1
"""Steps of this time go together."""


@dataclass(slots=True)
class ObservedStep:
    ms: float
    prompts_begun: int = 0
    prompts: int = 0
    prefill_tokens: int = 0
    prefill_squares: float = 0.0
    """The sum of ``end**2 - first**2`` over the chunks."""
    decode_sequences: int = 0
    decode_context_tokens: int = 0

    def add_chunk(self, first: int, end: int, begins: bool) -> None:
        self.prompts += 1
        self.prompts_begun += begins
        self.prefill_tokens += end - first
        self.prefill_squares += float(end * end - first * first)

    def add_decode(self, context_tokens: int) -> None:
        self.decode_sequences += 1
        self.decode_context_tokens += context_tokens


class StepsLink:
    def __init__(self, path: str) -> None:
        self._path = path
        self._stopping = threading.Event()
        self._attached: socket.socket | None = None
        self._steps: queue.SimpleQueue[ObservedStep | None] = queue.SimpleQueue()
        self.pace: Pace | None = None
        """As it was told last."""

    def start(self) -> None:
        """Attaches in the background, and again whenever the connection breaks."""
        threading.Thread(target=self._keep_attached, name="baton-steps", daemon=True).start()

    def stop(self) -> None:
        self._stopping.set()
        self._hang_up()

    def observed(self, step: ObservedStep) -> None:
        if self._attached is not None:
            self._steps.put(step)

    def _keep_attached(self) -> None:
        delays = backoff()
        while not self._stopping.is_set():
            try:
                with self._attach() as connection:
                    delays = backoff()
                    self._serve(connection)
            except Refused as error:
                logger.error("steps are not paced: %s", error)
                return
            except (OSError, frames.FrameError):
                pass  # Not there yet, or gone.
            self._stopping.wait(next(delays))

    def _attach(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(HANDSHAKE_SECONDS)
            connection.connect(self._path)
            connection.sendall(frames.encode({"type": "scheduler", "protocol": PROTOCOL}))
            answer = frames.receive(connection)
            if answer is None:
                raise frames.FrameError("the worker closed without a word")
            if answer["type"] != "attached" or answer.get("protocol") != PROTOCOL:
                raise Refused(answer.get("reason", "the worker speaks another protocol"))
            connection.settimeout(None)
            limit_sends(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _serve(self, connection: socket.socket) -> None:
        while not self._steps.empty():
            self._steps.get()  # Of the connection before.
        self._attached = connection
        reading = threading.Thread(target=self._read, args=(connection,), daemon=True)
        reading.start()
        try:
            while (step := self._steps.get()) is not None:
                time.sleep(BATCH_SECONDS)
                steps = [asdict(step)]
                while not self._steps.empty():
                    if (step := self._steps.get()) is None:
                        return
                    steps.append(asdict(step))
                connection.sendall(frames.encode({"type": "steps", "steps": steps}))
        finally:
            self._hang_up()
            reading.join()

    def _read(self, connection: socket.socket) -> None:
        try:
            while (message := frames.receive(connection)) is not None:
                if message["type"] == "pace":
                    self.pace = Pace.read(message["pace"])
        except (OSError, frames.FrameError):
            pass
        except (KeyError, TypeError, ValueError) as error:
            logger.error("the worker told a malformed pace: %r", error)
        finally:
            self.pace = None
            self._attached = None
            self._steps.put(None)

    def _hang_up(self) -> None:
        if (connection := self._attached) is not None:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # Closed already.
