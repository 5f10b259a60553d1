"""Who goes first in a real vLLM, and how much of a prompt its steps take in, by what its scheduler
tells of each step."""

import http.client
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from agent import Agent
from engine import Engine, needs_vllm
from legs import (
    PATIENCE_SECONDS,
    blocks_in_use,
    consume,
    eventually,
    leaves,
    new_key,
    params,
    produce,
    prompt_of,
    tokens_of,
)

pytestmark = needs_vllm

STEP_TOKENS = 512
"""vLLM's own budget (engine.py)."""
_seeds = itertools.count(1000)
"""A prompt that was seen before is not computed."""


@contextmanager
def decoding(engine: Engine, agent: Agent, prompt: list[int], **fields: Any) -> Iterator[None]:
    """A request that is given one token after another, until it hangs up."""
    body = {"model": "model", "prompt": prompt, "max_tokens": 1900 - len(prompt), "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", engine.port, timeout=PATIENCE_SECONDS)
    connection.request(
        "POST",
        "/v1/completions",
        json.dumps({**body, "ignore_eos": True, **fields}),
        {"content-type": "application/json"},
    )
    try:
        assert connection.getresponse().readline().startswith(b"data: ")
        yield
    finally:
        connection.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


@pytest.fixture(autouse=True)
def as_it_was(engine: Engine, agent: Agent) -> Iterator[None]:
    yield
    agent.pace(None)
    eventually(lambda: blocks_in_use(engine) == 0, "the end of all requests")


def set_pace(engine: Engine, agent: Agent, tokens: int | None) -> None:
    """Returns when the engine keeps to it. Needs somebody decoding."""
    agent.pace(None if tokens is None else leaves(tokens))
    chunk = STEP_TOKENS - 1 if tokens is None else tokens
    while chunks_beside_decodes(steps_of_a_prompt(engine, agent, 600))[0] != chunk:
        pass


def steps_of_a_prompt(engine: Engine, agent: Agent, length: int) -> list[dict[str, Any]]:
    """All steps from its first to its last."""
    mark = len(agent.steps)
    engine.complete(prompt_of(length, next(_seeds)), max_tokens=1)

    def of_it() -> list[dict[str, Any]]:
        # Before them there may be some of another that have only now been told.
        steps = agent.steps[mark:]
        while steps and not steps[-1]["prefill_tokens"]:
            steps.pop()
        tokens = 0
        for index in reversed(range(len(steps))):
            tokens += steps[index]["prefill_tokens"]
            if tokens == length:
                return steps[index:]
        return []

    return agent.wait(of_it, "the prompt's steps")


def chunks_beside_decodes(steps: list[dict[str, Any]]) -> list[int]:
    return [s["prefill_tokens"] for s in steps if s["prefill_tokens"] and s["decode_sequences"]]


def test_steps_are_told_as_they_were(engine: Engine, agent: Agent) -> None:
    steps = steps_of_a_prompt(engine, agent, 1200)
    assert [s["prefill_tokens"] for s in steps] == [512, 512, 176]
    assert [s["prompts_begun"] for s in steps] == [1, 0, 0]
    assert sum(s["prefill_squares"] for s in steps) == 1200**2
    assert all(s["prompts"] == 1 and s["decode_sequences"] == 0 and s["ms"] > 0 for s in steps)
    mark = len(agent.steps)
    engine.complete(prompt_of(40), max_tokens=5)
    agent.wait(lambda: len(agent.steps) >= mark + 5, "the steps")
    decodes = agent.steps[mark + 1 :]
    assert [s["decode_context_tokens"] for s in decodes] == [40, 41, 42, 43]


def test_a_prompt_takes_what_the_pace_leaves_beside_decodes(engine: Engine, agent: Agent) -> None:
    with decoding(engine, agent, prompt_of(20)):
        for tokens in (100, 48):
            set_pace(engine, agent, tokens)
            steps = steps_of_a_prompt(engine, agent, 960)
            chunks = chunks_beside_decodes(steps)
            assert set(chunks[:-1]) == {tokens} and sum(chunks) == 960
            # No decode waited for any of it.
            contexts = [s["decode_context_tokens"] for s in steps]
            assert contexts == list(range(contexts[0], contexts[0] + len(steps)))
        # Less than nothing is left: the prompt gets on all the same.
        set_pace(engine, agent, 32)
        agent.pace({**leaves(0), "step_ms": 0.0})
        assert set(chunks_beside_decodes(steps_of_a_prompt(engine, agent, 960))) == {32}
        set_pace(engine, agent, None)
        steps = steps_of_a_prompt(engine, agent, 960)
        assert chunks_beside_decodes(steps) == [511, 449]
        set_pace(engine, agent, 100)
    eventually(lambda: blocks_in_use(engine) == 0, "the end of the decode")
    # Alone, it has the whole step.
    assert [s["prefill_tokens"] for s in steps_of_a_prompt(engine, agent, 960)] == [512, 448]


def test_decodes_go_on_beside_a_handoff_and_ahead_of_prompts(
    engine: Engine, agent: Agent, threads: ThreadPoolExecutor
) -> None:
    prompt, key = prompt_of(300, seed=40), new_key()
    engine.reset_prefix_cache()
    expected = engine.complete(prompt, max_tokens=16)
    engine.reset_prefix_cache()
    produce(engine, agent, prompt, key)
    engine.reset_prefix_cache()
    agent.handoff(key).withheld = True
    with decoding(engine, agent, prompt_of(20)):
        set_pace(engine, agent, 32)
        mark = len(agent.steps)
        consumer = threads.submit(consume, engine, prompt, key)
        agent.wait(lambda: agent.handoff(key).subscribed, "the subscription")
        waited = len(agent.steps)
        agent.wait(lambda: len(agent.steps) >= waited + 10, "steps while the handoff waits")
        # A long prompt is under way when the handoff's KV comes.
        long = threads.submit(engine.complete, prompt_of(1900, seed=41), max_tokens=1)
        agent.wait(lambda: agent.steps[-1]["prefill_tokens"], "the long prompt's first chunk")
        agent.handoff(key).withheld = False
        agent.pump()
        assert tokens_of(consumer.result(PATIENCE_SECONDS)) == tokens_of(expected)
        long.result(PATIENCE_SECONDS)
        agent.wait(lambda: not agent.steps[-1]["prefill_tokens"], "the long prompt's end")
        steps = agent.steps[mark:]
    assert all(step["decode_sequences"] >= 1 for step in steps), "a step without the decode"
    both = [step for step in steps if step["decode_sequences"] == 2]
    assert len(both) >= 15, "the handoff's decode waited for the prompt that came before it"
    assert [s["prefill_tokens"] for s in both[:15]] == [32] * 15
    # Two contexts, each one token longer with each step.
    contexts = [step["decode_context_tokens"] for step in both]
    assert contexts == list(range(contexts[0], contexts[0] + 2 * len(both), 2))


def test_the_lowest_priority_is_served_first_and_a_handoff_before_all(
    engine: Engine, agent: Agent, threads: ThreadPoolExecutor
) -> None:
    first, late, early = new_key(), new_key(), new_key()
    taken, taken_prompt = new_key(), prompt_of(100, seed=50)
    engine.reset_prefix_cache()
    produce(engine, agent, taken_prompt, taken)
    engine.reset_prefix_cache()

    def leg(prompt: list[int], key: Any, priority: int) -> Future[Any]:
        fields = {"kv_transfer_params": params("produce", key), "priority": priority}
        return threads.submit(engine.complete, prompt, max_tokens=1, **fields)

    def waiting(count: int) -> None:
        eventually(lambda: engine.metric("vllm:num_requests_waiting") >= count, "the queue")

    with decoding(engine, agent, prompt_of(20)):
        set_pace(engine, agent, 32)
        legs = [leg(prompt_of(1700, seed=51), first, 0)]
        agent.wait(lambda: agent.seen("exported", first), "the first chunk")
        legs.append(leg(prompt_of(200, seed=52), late, 7))
        waiting(1)
        legs.append(leg(prompt_of(200, seed=53), early, -7))
        waiting(2)
        consumer = threads.submit(consume, engine, taken_prompt, taken, max_tokens=4)
        consumer.result(PATIENCE_SECONDS)
        assert not agent.seen("sealed", first), "the first prompt was too short for this test"
        for done in legs:
            done.result(PATIENCE_SECONDS)
    order = [(m["handoff"], m["generation"]) for m in agent.messages if m["type"] == "sealed"]
    assert order[-3:] == [first, early, late]


def test_kv_is_taken_as_it_is_needed(engine: Engine, agent: Agent) -> None:
    """Eight answers of up to 1,880 tokens: reserved, they would be 472 blocks of 182."""
    with ExitStack() as stack:
        mark, preempted = len(agent.steps), engine.metric("vllm:num_preemptions_total")
        for seed in range(8):
            stack.enter_context(decoding(engine, agent, prompt_of(20, seed=60 + seed)))
        ran = lambda: any(s["decode_sequences"] == 8 for s in agent.steps[mark:])  # noqa: E731
        agent.wait(ran, "a step with all eight")
        assert engine.metric("vllm:num_preemptions_total") == preempted


def test_without_its_worker_the_engine_keeps_its_own_budget(engine: Engine, agent: Agent) -> None:
    with decoding(engine, agent, prompt_of(20)):
        set_pace(engine, agent, 64)
        attached = agent.schedulers
        agent.close_scheduler()
        agent.wait(lambda: agent.schedulers > attached, "the scheduler again")
        # It has no pace before it is told one anew.
        assert chunks_beside_decodes(steps_of_a_prompt(engine, agent, 600)) == [511, 89]
