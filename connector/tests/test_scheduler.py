"""The scheduler without an engine, its steps played by hand: as vLLM runs it on CPUs, and with
asynchronous scheduling, as it does on GPUs."""

import uuid
import zlib
from collections import deque
from typing import Any

import pytest
import torch
from engine import MODEL, needs_vllm
from legs import leaves, params, prompt_of
from vllm import SamplingParams
from vllm.config import (
    CacheConfig,
    KVTransferConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from baton_connector.pacing import Pace
from baton_connector.scheduler import LOAD_STEPS, PacedScheduler

pytestmark = needs_vllm

BLOCK = 32
STEP_TOKENS = 512


def vllm_config(asynchronous: bool) -> VllmConfig:
    model = ModelConfig(model=MODEL, dtype="float32", max_model_len=2048)
    scheduler = SchedulerConfig(
        max_num_seqs=8,
        max_num_batched_tokens=STEP_TOKENS,
        max_model_len=2048,
        is_encoder_decoder=False,
        policy="priority",
    )
    cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=True)
    transfer = KVTransferConfig(
        kv_connector="BatonConnector",
        kv_connector_module_path="baton_connector",
        kv_role="kv_both",
        kv_load_failure_policy="fail",
        kv_connector_extra_config={"socket": f"/nowhere/{uuid.uuid4()}"},
    )
    config = VllmConfig(
        model_config=model,
        scheduler_config=scheduler,
        cache_config=cache,
        kv_transfer_config=transfer,
    )
    config.cache_config.num_gpu_blocks = 400
    # The CPU's part of vLLM has turned it off.
    config.scheduler_config.async_scheduling = asynchronous
    return config


class Played:
    """An engine that samples a token for whoever has none left to compute."""

    def __init__(self, asynchronous: bool) -> None:
        config = vllm_config(asynchronous)
        spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32
        )
        with set_current_vllm_config(config):
            self.scheduler = PacedScheduler(
                config,
                KVCacheConfig(
                    num_blocks=400,
                    kv_cache_tensors=[],
                    kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
                ),
                StructuredOutputManager(config),
                block_size=BLOCK,
            )
        self.observed: list[Any] = []
        self.scheduler._link.observed = self.observed.append
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        self._ahead = 2 if asynchronous else 1
        self._running: deque[tuple[Any, ModelRunnerOutput]] = deque()
        self.received: set[str] = set()
        self.prompts: dict[str, list[int]] = {}

    def pace(self, tokens: int | None) -> None:
        self.scheduler._link.pace = Pace.read(None if tokens is None else leaves(tokens))

    def add(
        self,
        name: str,
        prompt_tokens: int,
        priority: int = 0,
        consume: bool = False,
        lends: str | None = None,
    ) -> None:
        """It may lend the start of another's prompt."""
        sampling = SamplingParams(max_tokens=400, ignore_eos=True)
        if consume or lends:
            kv = params("lend" if lends else "consume", (str(uuid.uuid4()), 0))
            sampling.extra_args = {"kv_transfer_params": kv}
        prompt = self.prompts.get(lends or "", prompt_of(2000, seed=zlib.crc32(name.encode())))
        self.prompts[name] = prompt
        self.scheduler.add_request(
            Request(
                request_id=name,
                prompt_token_ids=prompt[:prompt_tokens],
                sampling_params=sampling,
                pooling_params=None,
                priority=priority,
                block_hasher=self._hasher,
            )
        )

    def step(self) -> dict[str, int]:
        """Schedules one step and takes in the output of one, and says who got how many tokens."""
        scheduled = self.scheduler.schedule()
        names = list(scheduled.num_scheduled_tokens)
        samples = [[] if self.scheduler.requests[n].is_prefill_chunk else [7] for n in names]
        received, self.received = self.received, set()
        output = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=samples,
            kv_connector_output=KVConnectorOutput(finished_recving=received),
        )
        self._running.append((scheduled, output))
        if len(self._running) == self._ahead:
            self.scheduler.update_from_output(*self._running.popleft())
        return dict(scheduled.num_scheduled_tokens)

    def until(self, name: str) -> dict[str, int]:
        for _ in range(10):
            if name in (step := self.step()):
                return step
        raise AssertionError(f"{name} is not scheduled")


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def played(request: pytest.FixtureRequest) -> Any:
    played = Played(request.param)
    assert isinstance(played.scheduler, AsyncScheduler) == request.param
    yield played
    played.scheduler.shutdown()


def test_without_a_pace_a_prompt_takes_the_whole_step(played: Played) -> None:
    played.add("decode", 20)
    assert played.until("decode") == {"decode": 20}
    played.add("prompt", 900)
    assert played.until("prompt") == {"decode": 1, "prompt": 511}


def test_beside_decodes_a_prompt_takes_what_the_pace_leaves(played: Played) -> None:
    played.pace(100)
    played.add("decode", 20)
    assert played.until("decode") == {"decode": 20}
    played.add("prompt", 450)
    steps = [played.until("prompt"), *(played.step() for _ in range(4))]
    assert [step["prompt"] for step in steps] == [100, 100, 100, 100, 50]
    assert all(step["decode"] == 1 for step in steps)
    assert played.step() == {"decode": 1, "prompt": 1}
    # Two decodes: the budget counts both.
    played.add("third", 300)
    assert played.until("third") == {"decode": 1, "prompt": 1, "third": 100}


def test_alone_a_prompt_takes_the_whole_step(played: Played) -> None:
    played.pace(100)
    played.add("prompt", 600)
    assert [played.step(), played.step()] == [{"prompt": 512}, {"prompt": 88}]


def test_a_decode_whose_kv_came_is_not_behind_the_prompt_before_it(played: Played) -> None:
    played.pace(64)
    played.add("decode", 20)
    played.until("decode")
    played.add("prompt", 1900)
    played.add("waiting", 700, priority=-5)
    played.until("waiting")
    # Its load begins although the step is full and others wait.
    played.add("consumer", 300, priority=9, consume=True)
    consumer = played.scheduler.requests["consumer"]
    steps = []
    while consumer.status != RequestStatus.WAITING_FOR_REMOTE_KVS:
        steps.append(played.step())
        assert len(steps) <= LOAD_STEPS
    # One step without prompts let it in.
    assert steps[-1] == {"decode": 1}
    played.received = {"consumer"}
    first = played.until("consumer")
    assert first["decode"] == first["consumer"] == 1
    for _ in range(3):
        assert played.step() == {"decode": 1, "consumer": 1, "waiting": 64}


def test_kv_that_came_waits_for_no_prompt(played: Played) -> None:
    for pace in (64, None):
        played.pace(pace)
        prompt, consumer = f"prompt-{pace}", f"consumer-{pace}"
        played.add(consumer, 300, consume=True)
        played.step()
        assert played.scheduler.requests[consumer].status == RequestStatus.WAITING_FOR_REMOTE_KVS
        played.add(prompt, 1900)
        played.until(prompt)
        played.received = {consumer}
        # With asynchronous scheduling the step after next is the first that knows of it.
        steps = [played.step() for _ in range(4)]
        assert sum(consumer in step for step in steps) >= 2
        assert all(prompt in step for step in steps)
        played.scheduler.finish_requests([prompt, consumer], RequestStatus.FINISHED_ABORTED)
        played.step()


def test_what_is_cached_is_lent_beside_long_prompts_and_no_more(played: Played) -> None:
    played.pace(64)
    played.add("decode", 321)
    while "decode" not in (step := played.step()) or step["decode"] != 1:
        pass
    played.add("prompt", 1900)
    played.until("prompt")
    played.add("lent", 257, priority=9, lends="decode")
    played.add("gone", 1601, priority=9, lends="prompt")
    steps = [played.step() for _ in range(LOAD_STEPS + 1)]
    assert steps[0] == {"decode": 1, "prompt": 64, "lent": 1}
    assert all(step["decode"] == 1 for step in steps)
    assert not any("gone" in step for step in steps), "it is not computed for that"
    assert sum("prompt" not in step for step in steps) <= 1


def test_the_lowest_priority_is_served_first(played: Played) -> None:
    played.pace(64)
    played.add("decode", 20)
    played.until("decode")
    for name, priority in [("late", 30), ("early", 10), ("middle", 20)]:
        played.add(name, 64, priority=priority)
    order = []
    for _ in range(5):
        order += [name for name, tokens in played.step().items() if tokens == 64]
    assert order == ["early", "middle", "late"]


def test_each_step_is_told_once_as_it_was(played: Played) -> None:
    played.add("decode", 20)
    played.until("decode")
    played.add("prompt", 600)
    steps = [played.until("prompt"), *(played.step() for _ in range(4))]
    assert len(steps) == 5
    told = [
        (s.prompts_begun, s.prefill_tokens, s.decode_sequences, s.decode_context_tokens)
        for s in played.observed
        if s.prefill_tokens > 20
    ]
    assert [t[:3] for t in told] == [(1, 511, 1), (0, 89, 1)]
    assert told[1][3] == told[0][3] + 1
    assert all(s.ms >= 0 for s in played.observed)
