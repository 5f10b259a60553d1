"""Requests to a real vLLM, and both legs of a handoff by one engine."""

import random
import time
import uuid
from typing import Any

import pytest
from agent import Agent, Key
from engine import Engine

EXTERNAL_HITS = "vllm:external_prefix_cache_hits_total"
PATIENCE_SECONDS = 60.0


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(f"{seed}.{length}").choices(range(100, 40_000), k=length)


def new_key(generation: int = 0) -> Key:
    return str(uuid.uuid4()), generation


def params(role: str, key: Key) -> dict[str, Any]:
    return {"baton": {"role": role, "handoff": key[0], "generation": key[1]}}


def produce(engine: Engine, agent: Agent, prompt: list[int], key: Key) -> dict[str, Any]:
    engine.complete(prompt, max_tokens=1, kv_transfer_params=params("produce", key))
    return agent.wait(lambda: agent.handoff(key).sealed, "the seal")


def consume(engine: Engine, prompt: list[int], key: Key, **fields: Any) -> dict[str, Any]:
    fields = {"max_tokens": 16, **fields}
    return engine.complete(prompt, kv_transfer_params=params("consume", key), **fields)


def tokens_of(answer: dict[str, Any]) -> list[list[int]]:
    return [choice["token_ids"] for choice in answer["choices"]]


def logprobs_of(answer: dict[str, Any]) -> list[float]:
    """A small model may stammer the same tokens after any prompt; these tell prompts apart."""
    return answer["choices"][0]["logprobs"]["token_logprobs"]


def same_logprobs(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return logprobs_of(one) == pytest.approx(logprobs_of(other), abs=1e-4)


def blocks_in_use(engine: Engine) -> float:
    """Of the KV cache, 0 to 1. vLLM refreshes it only with an answer's tokens."""
    engine.complete(prompt_of(8), max_tokens=2)
    return engine.metric("vllm:kv_cache_usage_perc")


def eventually(ready, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not ready():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.02)


def leaves(tokens: int) -> dict[str, Any]:
    """A pace that leaves room for so many tokens of prefill beside decodes, however many."""
    model = {
        "prefill_ms": [0.0, 1.0, 0.0],
        "decode_ms": [0.0, 0.0, 0.0],
        "prefill_interference_factor": 1.0,
    }
    return {"step_ms": float(tokens), "model": model}
