"""The half of the connector in the scheduler's process: which request has which part in a handoff,
and which of its blocks are complete when.

Order of vLLM's calls for one request: ``on_new_request``; ``get_num_new_matched_tokens`` whenever
it is considered for admission; ``update_state_after_alloc`` once it has blocks (for a consumer a
second time when its KV has come); ``build_connector_meta`` at the end of each ``schedule()``; at
last ``request_finished``.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

from .handoff import HandoffKey, Part, RecentHandoffs, Role, prompt_digest, read_part
from .plan import Export, ExportEnd, Seal, StepPlan, Subscribe, WorkerReport

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.baton_connector.scheduler")

_CLAIMS_KEPT = 4096
_FINISHED_WELL = (
    RequestStatus.FINISHED_STOPPED,
    RequestStatus.FINISHED_LENGTH_CAPPED,
    RequestStatus.FINISHED_REPETITION,
)


@dataclass(slots=True)
class _Producer:
    request: "Request"
    key: HandoffKey
    announced_blocks: int = 0
    sealed: bool = False
    surely_exported: bool = False
    cached_tokens: int | None = None
    lends: bool = False
    refused: bool = False
    """It was to lend what is not cached."""


class _Stage(Enum):
    QUEUED = auto()
    LOADING = auto()
    PAST = auto()


@dataclass(slots=True)
class _Consumer:
    key: HandoffKey | None
    stage: _Stage = _Stage.QUEUED


@dataclass(slots=True)
class _Claim:
    """A handoff is consumed by one request. Others of the same prompt (``n`` > 1) wait for it and
    find its blocks in the prefix cache."""

    owner: str
    loaded: bool | None = None
    """``None`` until it is known."""


class SchedulerSide:
    def __init__(self, block_size: int, layer_groups: int = 1) -> None:
        self._block_size = block_size
        self._layer_groups = layer_groups
        self._producers: dict[str, _Producer] = {}
        self._consumers: dict[str, _Consumer] = {}
        self._claims: OrderedDict[HandoffKey, _Claim] = OrderedDict()
        self._produced = RecentHandoffs()
        self._slots = _SlotForecast()
        self._plan = StepPlan()
        self._seq = 0

    def new_request(self, request: "Request") -> None:
        part = read_part(request.kv_transfer_params)
        if part is None:
            return
        if part.key is None:
            logger.warning("request %s: malformed handoff: %s", request.request_id, part.fault)
        if part.role is Role.CONSUME:
            self._new_consumer(request, part)
        else:
            self._new_producer(request, part)

    def _new_producer(self, request: "Request", part: Part) -> None:
        if part.key is None:
            return
        if part.key in self._produced:
            logger.warning("request %s: its handoff is another's", request.request_id)
            return
        self._produced.add(part.key)
        lends = part.role is Role.LEND
        self._producers[request.request_id] = _Producer(request, part.key, lends=lends)

    def _new_consumer(self, request: "Request", part: Part) -> None:
        self._consumers[request.request_id] = _Consumer(part.key)
        if part.key is not None and part.key not in self._claims:
            self._claims[part.key] = _Claim(request.request_id)
            if len(self._claims) > _CLAIMS_KEPT:
                self._claims.popitem(last=False)

    def matched_tokens(self, request: "Request", computed_tokens: int) -> tuple[int | None, bool]:
        """How many more prompt tokens come from outside. ``None``: ask again later."""
        producer = self._producers.get(request.request_id)
        if producer is not None and self._has_nothing_to_lend(producer, computed_tokens):
            # It waits until the worker, which hears of it, has given it up.
            return None, False
        consumer = self._consumers.get(request.request_id)
        # After a preemption vLLM computes again what it had: the handoff is long past.
        if consumer is None or consumer.stage is not _Stage.QUEUED:
            return 0, False
        missing = request.num_prompt_tokens - computed_tokens
        if missing <= 1:
            return 0, False
        claim = self._claims.get(consumer.key) if consumer.key else None
        if claim is not None and claim.owner != request.request_id:
            if claim.loaded is None:
                return None, False
            # The rest is what no prefix cache can hold: the block with the last token.
            if claim.loaded and missing <= self._block_size:
                return 0, False
        return missing, True

    def _has_nothing_to_lend(self, producer: _Producer, computed_tokens: int) -> bool:
        missing = producer.request.num_prompt_tokens - computed_tokens
        begun = producer.cached_tokens is not None
        if producer.lends and not producer.refused and not begun and missing > 1:
            producer.refused = True
            self._plan.notices.append(("aborted", producer.key))
        return producer.refused

    def allocated(self, request: "Request", block_ids: list[int], external_tokens: int) -> None:
        consumer = self._consumers.get(request.request_id)
        if consumer is None or consumer.stage is _Stage.PAST:
            return
        if external_tokens > 0:
            consumer.stage = _Stage.LOADING
            self._plan.subscribes.append(
                self._subscribe(request, consumer, block_ids, external_tokens)
            )
            return
        if consumer.stage is _Stage.QUEUED:
            self._nothing_to_load(request, consumer)
        consumer.stage = _Stage.PAST

    def _subscribe(
        self, request: "Request", consumer: _Consumer, block_ids: list[int], external_tokens: int
    ) -> Subscribe:
        tokens = request.num_prompt_tokens
        first = (tokens - external_tokens) // self._block_size
        claim = self._owned_claim(request.request_id, consumer)
        return Subscribe(
            req_id=request.request_id,
            key=consumer.key if claim else None,
            first_block=first,
            block_ids=block_ids[first : self._blocks(tokens)],
            prompt_tokens=tokens,
            prompt_digest=prompt_digest(request) if claim else "",
        )

    def _nothing_to_load(self, request: "Request", consumer: _Consumer) -> None:
        claim = self._owned_claim(request.request_id, consumer)
        if claim is None or consumer.key is None:
            return
        claim.loaded = True
        if request.skip_reading_prefix_cache:
            # For prompt_logprobs vLLM computes the whole prompt, whatever a connector has.
            logger.warning("request %s computes its whole prompt itself", request.request_id)
            self._plan.notices.append(("aborted", consumer.key))
        else:
            self._plan.notices.append(("not_needed", consumer.key))

    def _owned_claim(self, req_id: str, consumer: _Consumer) -> _Claim | None:
        """The claim, if the request has it and nothing has come of it yet."""
        claim = self._claims.get(consumer.key) if consumer.key else None
        owned = claim is not None and claim.owner == req_id and claim.loaded is None
        return claim if owned else None

    def build_plan(self, output: "SchedulerOutput") -> StepPlan:
        plan, self._plan = self._plan, StepPlan()
        self._seq += 1
        plan.seq = self._seq
        for req_id in output.preempted_req_ids or ():
            if producer := self._producers.get(req_id):
                # Its blocks are given away. What is exported stays so; the rest is announced again,
                # from the first block on, once it has been computed again.
                producer.announced_blocks = 0
                producer.sealed = producer.surely_exported = False
                plan.withdrawn.append(req_id)
        for req_id, tokens in output.num_scheduled_tokens.items():
            if (producer := self._producers.get(req_id)) and not producer.sealed:
                assert output.kv_connector_block_state is not None
                block_ids = output.kv_connector_block_state.resolve_block_ids(req_id)[0]
                self._announce(producer, tokens, block_ids, plan)
        return plan

    def _announce(
        self, producer: _Producer, scheduled: int, block_ids: list[int], plan: StepPlan
    ) -> None:
        request = producer.request
        if producer.cached_tokens is None:
            producer.cached_tokens = request.num_computed_tokens
        prompt_tokens = request.num_prompt_tokens
        # vLLM counts this step's tokens as computed only after it has asked for the plan.
        computed = request.num_computed_tokens + scheduled
        complete = computed >= prompt_tokens
        ready = self._blocks(prompt_tokens) if complete else computed // self._block_size
        blocks = [(i, block_ids[i]) for i in range(producer.announced_blocks, ready)]
        if not blocks:
            return
        producer.announced_blocks = ready
        self._slots.planned(plan.seq, len(blocks) * self._layer_groups)
        seal = None
        if complete:
            producer.sealed = True
            producer.surely_exported = self._slots.suffice()
            seal = Seal(prompt_tokens, prompt_digest(request), producer.cached_tokens)
        plan.exports.append(
            Export(request.request_id, producer.key, blocks, seal, producer.surely_exported)
        )

    def worker_output(self, output: "KVConnectorOutput") -> None:
        if isinstance(output.kv_connector_worker_meta, WorkerReport):
            self._slots.reported(output.kv_connector_worker_meta)
        for req_id in output.finished_recving or ():
            if (consumer := self._consumers.get(req_id)) and (
                claim := self._owned_claim(req_id, consumer)
            ):
                claim.loaded = req_id not in output.failed_recving

    def finished(self, request: "Request") -> bool:
        """True where the request's blocks must stay until the other half reports it as sent."""
        if producer := self._producers.pop(request.request_id, None):
            if producer.refused:
                return False
            well = producer.sealed and request.status in _FINISHED_WELL
            held = well and not producer.surely_exported
            self._plan.export_ends.append(
                ExportEnd(request.request_id, producer.key, aborted=not well, held=held)
            )
            return held
        if consumer := self._consumers.pop(request.request_id, None):
            self._consumer_finished(request.request_id, consumer)
        return False

    def _consumer_finished(self, req_id: str, consumer: _Consumer) -> None:
        claim = self._owned_claim(req_id, consumer)
        if claim is not None:
            claim.loaded = False
        if consumer.stage is _Stage.LOADING:
            # vLLM holds the blocks itself until the other half reports the request as received.
            self._plan.load_ends.append(req_id)
        elif consumer.stage is _Stage.QUEUED and claim is not None and consumer.key is not None:
            self._plan.notices.append(("aborted", consumer.key))

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block_size)


class _SlotForecast:
    """A lower bound of the free export slots, so that a producer that finishes in the step which
    exported its last block need not be held until the report of that step has come."""

    def __init__(self) -> None:
        self._free = 0
        self._planned: deque[tuple[int, int]] = deque()

    def planned(self, seq: int, slots: int) -> None:
        self._planned.append((seq, slots))

    def reported(self, report: WorkerReport) -> None:
        self._free = report.free_slots
        while self._planned and self._planned[0][0] <= report.seq:
            self._planned.popleft()

    def suffice(self) -> bool:
        return sum(slots for _, slots in self._planned) <= self._free
