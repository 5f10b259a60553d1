"""The half of the connector in a worker process: it owns the link and does all copying.

vLLM's calls in each step, empty ones too: ``handle_preemptions`` before the forward; where blocks
leave layer group by layer group, ``save_kv_layer`` after each layer's attention, unless the step runs
as one CUDA graph; after the forward ``wait_for_save``, ``get_transfer_results`` and
``build_connector_worker_meta`` (with speculative decoding ``wait_for_save`` comes last). All run on the
model's thread; the link's thread only fills an inbox. On a GPU the model's thread is far ahead of the
model: there another thread waits for the copies of a layer group and tells of them when they end.
"""

import queue
import threading

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
        self._cache = cache
        self._link = link
        self._lock = threading.RLock()
        self._copier = Copier(cache.device)
        self._pins_arena = cache.device.type == "cuda"
        self._connection: Connection | None = None
        self._begun_seq = 0
        self._done_seq = 0
        self._layers_left: list[set[str]] = []
        """Of each layer group those that the present step has not computed yet."""
        self._groups_left: set[int] = set()
        self._unfinished: deque[tuple[Ticket, Callable[[], None]]] = deque()
        self._awaited: queue.SimpleQueue[Ticket | None] | None = None
        self._exports = Exports(cache, self._copier, self._send, self._later)
        self._peers = Peers(self._pins_arena, self._tell)
        self._loads = Loads(cache, self._copier, self._peers, self._send, self._later)

    def before_forward(self, plan: StepPlan) -> None:
        """Takes up what needs no forward, so that a consumer does not wait for others' prefill."""
        with self._lock:
            self._copier.fence()
            if plan.seq > self._begun_seq:
                self._begin(plan)

    def layer_computed(self, plan: StepPlan, layer: str) -> None:
        """Exports the layer's group, if it was the last of it."""
        group = self._cache.group_of.get(layer)
        if group is None or plan.seq != self._begun_seq or group not in self._groups_left:
            return
        self._layers_left[group].discard(layer)
        if self._layers_left[group] or not plan.exports:
            return
        with self._lock:
            self._take_messages()
            self._group_computed(plan, group)
            self._exports.pump()
            self._finish_copies()

    def after_forward(self, plan: StepPlan) -> None:
        with self._lock:
            self.before_forward(plan)
            if plan.seq > self._done_seq:
                for group in sorted(self._groups_left):
                    self._group_computed(plan, group)
                for export in plan.exports:
                    self._exports.close(export)
                self._done_seq = plan.seq
            self._take_messages()
            self._exports.pump()
            self._finish_copies()

    def results(self) -> KVConnectorTransferResults:
        with self._lock:
            received, failed = self._loads.take_received()
            sent = self._exports.take_sent()
        return KVConnectorTransferResults(
            finished_sending=sent, finished_recving=received, failed_recving=failed
        )

    def report(self) -> WorkerReport:
        with self._lock:
            return WorkerReport(self._done_seq, self._exports.free_slots)

    def stop(self) -> None:
        self._link.stop()
        self._copier.drain()
        if self._awaited is not None:
            self._awaited.put(None)

    def _begin(self, plan: StepPlan) -> None:
        self._begun_seq = plan.seq
        self._groups_left = set(range(self._cache.layer_groups))
        self._layers_left = [set() for _ in self._groups_left]
        for layer, group in self._cache.group_of.items():
            self._layers_left[group].add(layer)
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

    def _group_computed(self, plan: StepPlan, group: int) -> None:
        self._groups_left.discard(group)
        for export in plan.exports:
            self._exports.add(export, group)

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
        ticket = self._copier.ticket()
        self._unfinished.append((ticket, what))
        # Of whole steps the model's own thread tells soon enough.
        if self._copier.is_asynchronous and self._cache.layer_groups > 1:
            if self._awaited is None:
                self._awaited = queue.SimpleQueue()
                thread = threading.Thread(target=self._await_copies, args=(self._awaited,))
                thread.name, thread.daemon = "baton-copies", True
                thread.start()
            self._awaited.put(ticket)

    def _await_copies(self, awaited: "queue.SimpleQueue[Ticket | None]") -> None:
        while (ticket := awaited.get()) is not None:
            ticket.synchronize()
            with self._lock:
                self._finish_copies()

    def _finish_copies(self) -> None:
        while self._unfinished and self._unfinished[0][0].query():
            self._unfinished.popleft()[1]()
