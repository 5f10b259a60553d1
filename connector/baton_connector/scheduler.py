"""vLLM's scheduler, with steps as large as the decodes in them can bear.

Loaded by ``--scheduler-cls baton_connector.scheduler.PacedScheduler``, beside the connector. What a
step computes is vLLM's own choice; this class says in which order it looks at requests that run, how
many tokens the step may have, and tells the worker how long it took. Without a worker, or a pace from
it, vLLM's budget of tokens holds.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from .compatibility import Unsupported, socket_path
from .handoff import Role, read_part
from .steps import ObservedStep, StepsLink

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.baton_connector.scheduler")

BEFORE_ALL = -(1 << 62)
"""The priority of a request whose KV comes from elsewhere: its load takes no part of a step, and once
it has come, it is a decode. Of one, too, that lends what is cached: all that is computed of it is a token."""
LOAD_STEPS = 4
"""Of so many steps one at most is given up by prompts, so that loads can begin."""


@dataclass(slots=True)
class _Room:
    """Of one step, for whom: tokens."""

    decodes: int
    arrived: int
    """Those whose KV has come from elsewhere: a token each, their first. Of those that lend what is
    cached it is the only one."""
    prompts: int


@dataclass(slots=True)
class _InFlight:
    output: "SchedulerOutput"
    began: float
    step: ObservedStep


class _Paced(Scheduler):
    """Put before the scheduler that it paces."""

    def __init__(self, vllm_config: "VllmConfig", *args: Any, **kwargs: Any) -> None:
        if vllm_config.kv_transfer_config is None:
            raise Unsupported("Baton's scheduler needs Baton's connector (--kv-transfer-config)")
        super().__init__(vllm_config, *args, **kwargs)
        self._full_budget_tokens = self.max_num_scheduled_tokens
        self._in_flight: deque[_InFlight] = deque()
        self._last_output = 0.0
        self._steps_since_loads = 0
        self._load_let_in = ""
        self._new_lenders = 0
        self._link = StepsLink(socket_path(vllm_config))
        self._link.start()

    def add_request(self, request: "Request") -> None:
        part = read_part(request.kv_transfer_params)
        if part is not None and part.role is not Role.PRODUCE:
            request.priority = BEFORE_ALL
            self._new_lenders += part.role is Role.LEND
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> "SchedulerOutput":
        began = time.monotonic()
        # vLLM gives out a step's tokens in this order: a long prompt would leave none to the decodes
        # behind it.
        self.running.sort(key=_turn)
        room = self._room()
        prompts = sum(request.is_prefill_chunk for request in self.running)
        # Who runs is given tokens before who waits, and one prompt can take them all. Of one it can be
        # said how many it gets; of several, only that they get none.
        if (room.arrived and prompts > 1) or (prompts and self._lets_loads_begin()):
            throttle_prefills, self.prefill_capacity_bound = True, False
        with self._budget(room, one_prompt=prompts == 1):
            output = super().schedule(throttle_prefills)
        if output.total_num_scheduled_tokens > 0:
            self._in_flight.append(_InFlight(output, began, self._step_of(output)))
        return output

    def update_from_output(
        self, scheduler_output: "SchedulerOutput", model_runner_output: "ModelRunnerOutput"
    ) -> Any:
        now = time.monotonic()
        if self._in_flight and self._in_flight[0].output is scheduler_output:
            done = self._in_flight.popleft()
            # With asynchronous scheduling a step is scheduled while the one before it still runs.
            done.step.ms = 1000 * (now - max(done.began, self._last_output))
            self._last_output = now
            self._link.observed(done.step)
        return super().update_from_output(scheduler_output, model_runner_output)

    def shutdown(self) -> None:
        self._link.stop()
        super().shutdown()

    def _room(self) -> _Room:
        sequences = context_tokens = 0
        room = _Room(0, 0, 0)
        for request in self.running:
            if not request.is_prefill_chunk:
                sequences += 1
                context_tokens += request.num_computed_tokens
                room.decodes += max(_missing_tokens(request), 1)
        for request in self.kv_holding_waiting:
            if request.request_id in self.finished_recving_kv_req_ids:
                sequences += 1
                context_tokens += request.num_tokens
                room.arrived += 1
        # Somebody waits for each of them. One that finds no room in its first step waits as loads do.
        room.arrived += self._new_lenders
        self._new_lenders = 0
        rest = max(self._full_budget_tokens - room.decodes - room.arrived, 0)
        pace = self._link.pace
        if pace is None or sequences == 0:
            room.prompts = rest
        else:
            room.prompts = pace.prefill_tokens(sequences, context_tokens, self._prompts())
            room.prompts = min(room.prompts, rest)
        return room

    def _lets_loads_begin(self) -> bool:
        """Whether this step is the one in a few of which prompts get nothing."""
        self._steps_since_loads += 1
        head = self.waiting.peek_request() if self.waiting else None
        if (
            head is None
            or head.priority != BEFORE_ALL
            or head.request_id == self._load_let_in
            or self._steps_since_loads < LOAD_STEPS
        ):
            return False
        # One that finds no room in the KV cache now must not hold prompts up again and again.
        self._steps_since_loads, self._load_let_in = 0, head.request_id
        return True

    @contextmanager
    def _budget(self, room: _Room, one_prompt: bool) -> Iterator[None]:
        config, long_prompt = self.scheduler_config, self.scheduler_config.long_prefill_token_threshold
        adaptive = self.adaptive_long_prefill_threshold
        self.max_num_scheduled_tokens = min(
            room.decodes + room.arrived + room.prompts, self._full_budget_tokens
        )
        if room.arrived and one_prompt and room.prompts:
            config.long_prefill_token_threshold = min(long_prompt or room.prompts, room.prompts)
            self.adaptive_long_prefill_threshold = False
        try:
            yield
        finally:
            self.max_num_scheduled_tokens = self._full_budget_tokens
            config.long_prefill_token_threshold = long_prompt
            self.adaptive_long_prefill_threshold = adaptive

    def _prompts(self) -> Iterator[tuple[int, int]]:
        """Those that have their turn next, as (computed tokens, remaining tokens)."""
        for request in self.running:
            if request.is_prefill_chunk:
                yield request.num_computed_tokens, _missing_tokens(request)
        # Which of their blocks are cached shows only when they are admitted.
        for request in self.waiting:
            if request.priority != BEFORE_ALL:
                yield 0, request.num_tokens

    def _step_of(self, output: "SchedulerOutput") -> ObservedStep:
        step = ObservedStep(ms=0.0)
        begun = {request.req_id for request in output.scheduled_new_reqs}
        begun |= output.scheduled_cached_reqs.resumed_req_ids
        for req_id, tokens in output.num_scheduled_tokens.items():
            request = self.requests[req_id]
            # vLLM counts a step's tokens as computed once it is scheduled.
            end = request.num_computed_tokens
            first = end - tokens
            if (tokens == 1 and first > 0) or first >= request.num_prompt_tokens:
                step.add_decode(first)
            else:
                step.add_chunk(first, end, req_id in begun)
        return step


def _turn(request: "Request") -> tuple[bool, int]:
    """Decodes first, as they came, then prompts under way by their priority."""
    return (True, request.priority) if request.is_prefill_chunk else (False, 0)


def _missing_tokens(request: "Request") -> int:
    known = request.num_tokens_with_spec + request.num_output_placeholders
    return known - request.num_computed_tokens


class PacedScheduler(_Paced, AsyncScheduler):
    """What vLLM is told to load: it asks for no other class where it schedules no step ahead, on CPUs
    and with ``--no-async-scheduling``."""

    def __new__(cls, vllm_config: "VllmConfig", *args: Any, **kwargs: Any) -> Any:
        if vllm_config.scheduler_config.async_scheduling:
            return super().__new__(cls)
        return _Paced(vllm_config, *args, **kwargs)
