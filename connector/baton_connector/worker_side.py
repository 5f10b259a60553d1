"""The half of the connector in a worker process: it owns the link and does all copying.

vLLM's calls in each step, empty ones too: ``handle_preemptions`` before the forward; after it
``wait_for_save``, ``get_transfer_results`` and ``build_connector_worker_meta`` (with speculative
decoding ``wait_for_save`` comes last). All run on the model's thread; the link's thread only fills
an inbox.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.logger import init_logger

from .exports import Exports
from .handoff import HandoffKey
from .layout import Copier, PagedCache, Ticket
from .link import Attached, Connection, Detached, Event, Link
from .loads import Loads
from .peers import PeerMapped, Peers
from .plan import StepPlan, WorkerReport

logger = init_logger("vllm.baton_connector.worker")


class WorkerSide:
    def __init__(self, cache: PagedCache, link: Link) -> None:
        self._link = link
        self._copier = Copier(cache.device)
        self._pins_arena = cache.device.type == "cuda"
        self._connection: Connection | None = None
        self._begun_seq = 0
        self._done_seq = 0
        self._unfinished: deque[tuple[Ticket, Callable[[], None]]] = deque()
        self._exports = Exports(cache, self._copier, self._send, self._later)
        self._peers = Peers(self._pins_arena, self._tell)
        self._loads = Loads(cache, self._copier, self._peers, self._send, self._later)

    def before_forward(self, plan: StepPlan) -> None:
        """Takes up what needs no forward, so that a consumer does not wait for others' prefill."""
        self._copier.fence()
        if plan.seq <= self._begun_seq:
            return
        self._begun_seq = plan.seq
        # First what has come and been given up: the blocks of either may be another's in this plan.
        for req_id in plan.withdrawn:
            self._exports.withdraw(req_id)
        for end in plan.export_ends:
            self._exports.end(end)
        for req_id in plan.load_ends:
            self._loads.abort(req_id)
        self._take_messages()
        for kind, key in plan.notices:
            self._send(kind, key, {})
        for subscribe in plan.subscribes:
            self._loads.subscribe(subscribe)

    def after_forward(self, plan: StepPlan) -> None:
        self.before_forward(plan)
        if plan.seq > self._done_seq:
            for export in plan.exports:
                self._exports.add(export)
            self._done_seq = plan.seq
        self._take_messages()
        self._exports.pump()
        self._finish_copies()

    def results(self) -> KVConnectorTransferResults:
        received, failed = self._loads.take_received()
        return KVConnectorTransferResults(
            finished_sending=self._exports.take_sent(),
            finished_recving=received,
            failed_recving=failed,
        )

    def report(self) -> WorkerReport:
        return WorkerReport(self._done_seq, self._exports.free_slots)

    def stop(self) -> None:
        self._link.stop()
        self._copier.drain()

    def _take_messages(self) -> None:
        for event in self._link.drain():
            self._take(event)
        self._finish_copies()

    def _take(self, event: Event) -> None:
        if isinstance(event, Attached):
            if self._pins_arena:
                event.connection.arena.pin()
            self._connection = event.connection
            self._exports.attached(event.connection.arena)
            self._loads.attached(event.connection.arena)
        elif isinstance(event, Detached):
            self._copier.drain()
            self._finish_copies()
            self._connection = None
            self._exports.detached()
            self._loads.detached()
            self._peers.clear()
            event.connection.arena.unpin()
        elif isinstance(event, PeerMapped):
            self._peers.add(event)
        else:
            try:
                self._dispatch(event.message)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                logger.error("the worker broke the protocol: %r", error)
                if self._connection is not None:
                    self._connection.close()

    def _dispatch(self, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind == "release":
            self._exports.release(message["slots"])
        elif kind == "load":
            self._loads.load(HandoffKey.from_wire(message), message["blocks"])
        elif kind == "load_mapped":
            key = HandoffKey.from_wire(message)
            self._loads.load_mapped(key, message["arena"], message["blocks"])
        elif kind == "unmap":
            self._peers.remove(message["arena"])
        elif kind == "complete":
            self._loads.complete(HandoffKey.from_wire(message))
        elif kind == "failed":
            self._loads.failed(HandoffKey.from_wire(message), str(message["reason"]))
        elif kind == "cancel":
            self._exports.cancel(HandoffKey.from_wire(message))
        else:
            raise ValueError("an unknown message")

    def _send(self, kind: str, key: HandoffKey, fields: dict[str, Any]) -> None:
        self._tell({"type": kind, **key.wire(), **fields})

    def _tell(self, message: dict[str, Any]) -> None:
        if self._connection is not None:
            self._connection.send(message)

    def _later(self, what: Callable[[], None]) -> None:
        self._unfinished.append((self._copier.ticket(), what))

    def _finish_copies(self) -> None:
        while self._unfinished and self._unfinished[0][0]():
            self._unfinished.popleft()[1]()
