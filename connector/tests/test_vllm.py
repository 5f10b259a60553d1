"""The connector inside a real vLLM. Runs where BATON_VLLM names a virtual environment with vLLM and
BATON_MODEL a model directory."""

import http.client
import itertools
import json
import os
import random
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from agent import PEER, Agent
from engine import LAYER_GROUPS, MODEL, Engine, needs_vllm, status_of
from legs import (
    EXTERNAL_HITS,
    PATIENCE_SECONDS,
    blocks_in_use,
    consume,
    eventually,
    new_key,
    params,
    produce,
    prompt_of,
    same_logprobs,
    tokens_of,
)

pytestmark = needs_vllm

BLOCK = 32


def test_the_hello_says_what_the_engine_is(engine: Engine, agent: Agent) -> None:
    compatibility = agent.hello["compatibility"]
    assert compatibility["model"] == os.path.basename(os.path.abspath(MODEL or ""))
    assert compatibility["kv_dtype"] == "float32"
    assert compatibility["block_size_tokens"] == BLOCK
    assert compatibility["layer_groups"] == LAYER_GROUPS
    assert compatibility["block_bytes"] == 30 // LAYER_GROUPS * 3 * BLOCK * 128 * 4
    assert compatibility["kv_layout"].endswith(f"30*3x{BLOCK}x128@{BLOCK * 128}.128.1")
    assert compatibility["kv_heads"].endswith(
        f"/3/{30 // LAYER_GROUPS}*h3.{BLOCK * 128 * 4}"
    )
    assert len(compatibility["revision"]) == 64
    assert (compatibility["tensor_parallel_rank"], compatibility["tensor_parallel_size"]) == (0, 1)


def indices(first: int, end: int) -> range:
    """Of the prompt's blocks from one to before another, in all layer groups."""
    return range(first * LAYER_GROUPS, end * LAYER_GROUPS)


def test_a_layer_group_leaves_before_the_next_is_computed(engine: Engine, agent: Agent) -> None:
    """What was computed when a message was sent is all in that message: of what leaves after the step
    there is one alone."""
    key = new_key()
    engine.reset_prefix_cache()
    produce(engine, agent, prompt_of(1100, seed=40), key)
    told = [[block["index"] for block in m["blocks"]] for m in agent.seen("exported", key)]
    by_step = []
    for first, end in ((0, 16), (16, 32), (32, 35)):
        groups = [list(indices(first, end))[group::LAYER_GROUPS] for group in range(LAYER_GROUPS)]
        by_step += groups
    assert told == by_step, "three steps of 512 tokens"


@pytest.fixture
def leaving_blocks_there(agent: Agent) -> Iterator[None]:
    """Blocks are loaded from where they lie, in another worker's arena."""
    if not agent.answers_about(PEER):
        agent.map_peer()
    agent.leaves_blocks_there = True
    yield
    agent.leaves_blocks_there = False


@pytest.mark.parametrize("length", [33, 1500])
def test_a_handoff_from_where_its_blocks_lie_answers_as_an_aggregated_request(
    engine: Engine, agent: Agent, length: int, leaving_blocks_there: None
) -> None:
    prompt, key = prompt_of(length, seed=40), new_key()
    engine.reset_prefix_cache()
    aggregated = engine.complete(prompt, max_tokens=16, logprobs=1)
    engine.reset_prefix_cache()
    assert agent.answers_about(PEER) == [{"type": "mapped", "arena": PEER}]
    produce(engine, agent, prompt, key)
    engine.reset_prefix_cache()
    split = consume(engine, prompt, key, logprobs=1)
    assert tokens_of(split) == tokens_of(aggregated) and same_logprobs(split, aggregated)
    loaded = [index for message in agent.seen("loaded_mapped", key) for index in message["indices"]]
    assert sorted(loaded) == list(indices(0, -(-length // BLOCK)))
    assert not agent.seen("loaded", key) and not agent.seen("corrupt", key)


@pytest.mark.parametrize("length", [31, 32, 33, 100, 1500])
def test_a_handoff_answers_as_an_aggregated_request(
    engine: Engine, agent: Agent, length: int
) -> None:
    prompt, key = prompt_of(length), new_key()
    engine.reset_prefix_cache()
    aggregated = engine.complete(prompt, max_tokens=16, logprobs=1)
    engine.reset_prefix_cache()
    sealed = produce(engine, agent, prompt, key)
    assert (sealed["prompt_tokens"], sealed["cached_tokens"]) == (length, 0)
    assert sorted(agent.handoff(key).blocks) == list(indices(0, -(-length // BLOCK)))

    engine.reset_prefix_cache()
    hits = engine.metric(EXTERNAL_HITS)
    split = consume(engine, prompt, key, logprobs=1)
    assert tokens_of(split) == tokens_of(aggregated)
    assert same_logprobs(split, aggregated)
    assert engine.metric(EXTERNAL_HITS) - hits == length
    usage = [a["usage"]["completion_tokens"] for a in (split, aggregated)]
    assert usage[0] == usage[1] and split["usage"]["prompt_tokens"] == length
    handoff = agent.handoff(key)
    assert handoff.sent == set(indices(0, -(-length // BLOCK)))
    loaded = [slot for message in agent.seen("loaded", key) for slot in message["slots"]]
    assert len(loaded) == len(handoff.sent)
    assert not agent.seen("aborted", key)


def test_another_block_gives_another_answer(engine: Engine, agent: Agent) -> None:
    """So the answers above do come from the blocks that were handed over. (Blocks in another order
    would not show: a key has its position in it, and attention sums over all of them.)"""
    prompt, key, forged, foreign = prompt_of(200, seed=1), new_key(), new_key(), new_key()
    engine.reset_prefix_cache()
    for handoff in (key, forged):
        produce(engine, agent, prompt, handoff)
    produce(engine, agent, prompt_of(200, seed=101), foreign)
    engine.reset_prefix_cache()
    honest = consume(engine, prompt, key, logprobs=1)
    agent.handoff(forged).blocks[3] = agent.handoff(foreign).blocks[3]
    engine.reset_prefix_cache()
    assert not same_logprobs(consume(engine, prompt, forged, logprobs=1), honest)


def test_both_legs_may_start_together(engine: Engine, agent: Agent) -> None:
    prompt, key = prompt_of(300, seed=2), new_key()
    engine.reset_prefix_cache()
    aggregated = engine.complete(prompt, max_tokens=16)
    engine.reset_prefix_cache()
    with ThreadPoolExecutor() as pool:
        consumer = pool.submit(consume, engine, prompt, key)
        agent.wait(lambda: agent.handoff(key).subscribed, "the subscription")
        produce(engine, agent, prompt, key)
        assert tokens_of(consumer.result(PATIENCE_SECONDS)) == tokens_of(aggregated)


def test_prefix_cached_blocks_are_exported_too(engine: Engine, agent: Agent) -> None:
    prompt = prompt_of(100, seed=3)
    engine.reset_prefix_cache()
    first, second = new_key(), new_key()
    produce(engine, agent, prompt, first)
    assert produce(engine, agent, prompt, second)["cached_tokens"] == 96
    exported = agent.handoff(second).blocks
    assert {i: exported[i] for i in indices(0, 3)} == {
        i: agent.handoff(first).blocks[i] for i in indices(0, 3)
    }


def test_a_second_turn_fetches_only_what_is_new(engine: Engine, agent: Agent) -> None:
    prompt = prompt_of(100, seed=4)
    longer = prompt + prompt_of(60, seed=5)
    engine.reset_prefix_cache()
    aggregated = engine.complete(longer, max_tokens=16)
    first, second = new_key(), new_key()
    produce(engine, agent, prompt, first)
    produce(engine, agent, longer, second)
    engine.reset_prefix_cache()
    consume(engine, prompt, first, max_tokens=1)
    assert tokens_of(consume(engine, longer, second)) == tokens_of(aggregated)
    assert agent.handoff(first).subscribed["first_block"] == 0
    assert agent.handoff(second).subscribed["first_block"] == 3 * LAYER_GROUPS
    assert agent.handoff(second).sent == set(indices(3, 5))


def test_a_cached_prefix_is_lent_and_found_where_it_is_loaded(engine: Engine, agent: Agent) -> None:
    """One engine plays both, its cache emptied in between."""
    prompt, key = prompt_of(700, seed=30), new_key()
    start = prompt[: 20 * BLOCK + 1]
    engine.reset_prefix_cache()
    aggregated = engine.complete(prompt, max_tokens=16, logprobs=1)
    engine.complete(start, max_tokens=1, kv_transfer_params=params("lend", key))
    sealed = agent.wait(lambda: agent.handoff(key).sealed, "the seal")
    assert (sealed["prompt_tokens"], sealed["cached_tokens"]) == (len(start), 20 * BLOCK)
    assert sorted(agent.handoff(key).blocks) == list(indices(0, 21))

    engine.reset_prefix_cache()
    hits = engine.metric(EXTERNAL_HITS)
    consume(engine, start, key, max_tokens=1)
    assert engine.metric(EXTERNAL_HITS) - hits == len(start)
    answer = engine.complete(prompt, max_tokens=16, logprobs=1)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 20 * BLOCK
    assert tokens_of(answer) == tokens_of(aggregated) and same_logprobs(answer, aggregated)


def test_what_is_not_cached_is_not_computed_to_be_lent(engine: Engine, agent: Agent) -> None:
    prompt, key = prompt_of(700, seed=31), new_key()
    engine.reset_prefix_cache()
    engine.complete(prompt[:320], max_tokens=1)
    body = {
        "model": "model",
        "prompt": prompt[:641],
        "max_tokens": 1,
        "kv_transfer_params": params("lend", key),
    }
    wait = lambda: agent.wait(lambda: agent.seen("aborted", key), "aborted")  # noqa: E731
    post_and_hang_up(engine, body, wait)
    eventually(lambda: blocks_in_use(engine) == 0, "the release of the blocks")
    assert not agent.handoff(key).blocks and len(agent.seen("aborted", key)) == 1
    answer = engine.complete(prompt, max_tokens=1)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 320


def test_what_is_cached_whole_is_not_needed(engine: Engine, agent: Agent) -> None:
    prompt, key = prompt_of(65, seed=6), new_key()
    engine.reset_prefix_cache()
    engine.complete(prompt, max_tokens=1)
    consume(engine, prompt, key)
    agent.wait(lambda: agent.seen("not_needed", key), "not_needed")
    assert not agent.seen("subscribe", key)


def test_several_choices_share_one_handoff(engine: Engine, agent: Agent) -> None:
    prompt, key = prompt_of(100, seed=7), new_key()
    engine.reset_prefix_cache()
    sampling = {"n": 2, "temperature": 0.7, "seed": 1, "max_tokens": 8}
    aggregated = engine.complete(prompt, **sampling)
    engine.reset_prefix_cache()
    produce(engine, agent, prompt, key)
    engine.reset_prefix_cache()
    split = consume(engine, prompt, key, **sampling)
    assert tokens_of(split) == tokens_of(aggregated)
    assert tokens_of(split)[0] != tokens_of(split)[1]
    assert len(agent.seen("subscribe", key)) == 1


def test_more_blocks_than_export_slots(engine: Engine, agent: Agent) -> None:
    """The engine holds the request's blocks until slots are released, then frees them."""
    prompt, key = prompt_of(1900, seed=8), new_key()
    other, other_key = prompt_of(640, seed=9), new_key()
    engine.reset_prefix_cache()
    aggregated = engine.complete(prompt, max_tokens=4)
    engine.reset_prefix_cache()
    agent.handoff(key).kept = True
    engine.complete(prompt, max_tokens=1, kv_transfer_params=params("produce", key))
    assert agent.handoff(key).sealed is None
    assert len(agent.handoff(key).blocks) == 48, "a quarter of 64 slots is kept for others"
    agent.handoff(other_key).kept = True
    engine.complete(other, max_tokens=1, kv_transfer_params=params("produce", other_key))
    assert len(agent.handoff(other_key).blocks) == 1
    assert blocks_in_use(engine) > 0
    agent.handoff(key).kept = agent.handoff(other_key).kept = False
    agent.release_all()
    agent.wait(lambda: agent.handoff(key).sealed and agent.handoff(other_key).sealed, "both seals")
    eventually(lambda: blocks_in_use(engine) == 0, "the release of the blocks")
    engine.reset_prefix_cache()
    assert tokens_of(consume(engine, prompt, key, max_tokens=4)) == tokens_of(aggregated)


def test_a_cancelled_producer_holds_no_blocks(engine: Engine, agent: Agent) -> None:
    prompt, key = prompt_of(1900, seed=10), new_key()
    engine.reset_prefix_cache()
    agent.handoff(key).kept = True
    engine.complete(prompt, max_tokens=1, kv_transfer_params=params("produce", key))
    assert blocks_in_use(engine) > 0
    agent.send({"type": "cancel", "handoff": key[0], "generation": key[1]})
    eventually(lambda: blocks_in_use(engine) == 0, "the release of the blocks")
    agent.release_all()
    assert not agent.seen("sealed", key) and not agent.seen("aborted", key)


def test_a_failed_handoff_fails_the_request(engine: Engine, agent: Agent) -> None:
    prompt, key = prompt_of(100, seed=11), new_key()
    engine.reset_prefix_cache()
    agent.handoff(key).broken = "the prefill died"
    with pytest.raises(urllib.error.HTTPError) as error:
        consume(engine, prompt, key)
    assert status_of(error.value) == 500
    eventually(lambda: blocks_in_use(engine) == 0, "the release of the blocks")
    assert not agent.seen("aborted", key)


def test_another_prompt_under_the_same_handoff_is_not_loaded(engine: Engine, agent: Agent) -> None:
    key = new_key()
    engine.reset_prefix_cache()
    produce(engine, agent, prompt_of(100, seed=12), key)
    with pytest.raises(urllib.error.HTTPError) as error:
        consume(engine, prompt_of(100, seed=13), key)
    assert status_of(error.value) == 500


def test_a_malformed_consumer_fails_and_a_malformed_producer_does_not(
    engine: Engine, agent: Agent
) -> None:
    prompt = prompt_of(100, seed=14)
    engine.reset_prefix_cache()
    for baton in ({"role": "consume"}, {"role": "consume", "handoff": "x", "generation": 0}, 7):
        with pytest.raises(urllib.error.HTTPError) as error:
            engine.complete(prompt, max_tokens=1, kv_transfer_params={"baton": baton})
        assert status_of(error.value) == 500
    for foreign in ({"baton": {"role": "produce"}}, {"other": 1}):
        engine.complete(prompt, max_tokens=1, kv_transfer_params=foreign)


def post_and_hang_up(engine: Engine, body: dict[str, Any], before_hanging_up) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", engine.port, timeout=PATIENCE_SECONDS)
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    before_hanging_up()
    connection.close()


def test_an_abort_while_waiting_frees_the_blocks(engine: Engine, agent: Agent) -> None:
    prompt, key = prompt_of(500, seed=15), new_key()
    engine.reset_prefix_cache()
    produce(engine, agent, prompt, key)
    engine.reset_prefix_cache()
    agent.handoff(key).withheld = True
    body = {"model": "model", "prompt": prompt, "kv_transfer_params": params("consume", key)}

    def subscribed() -> None:
        agent.wait(lambda: agent.handoff(key).subscribed, "the subscription")
        assert blocks_in_use(engine) > 0

    post_and_hang_up(engine, body, subscribed)
    agent.wait(lambda: agent.seen("aborted", key), "aborted")
    eventually(lambda: blocks_in_use(engine) == 0, "the release of the blocks")
    assert len(agent.seen("aborted", key)) == 1

    # What comes late finds no load, and its slot comes back all the same.
    with agent._changed:
        slot = agent._free_import.pop()
        name = {"handoff": key[0], "generation": key[1]}
        agent.send({"type": "load", **name, "blocks": [{"index": 0, "slot": slot, "crc32": 0}]})
        agent.send({"type": "complete", **name})
    engine.complete(prompt_of(8), max_tokens=2)
    agent.wait(lambda: agent.seen("loaded", key), "the slot")
    assert engine.process.poll() is None


def test_an_aborted_producer_says_so(engine: Engine, agent: Agent) -> None:
    prompt, key = prompt_of(1900, seed=16), new_key()
    engine.reset_prefix_cache()
    body = {
        "model": "model",
        "prompt": prompt,
        "max_tokens": 1,
        "kv_transfer_params": params("produce", key),
    }
    wait = lambda: agent.wait(lambda: agent.seen("exported", key), "the first block")  # noqa: E731
    post_and_hang_up(engine, body, wait)
    agent.wait(lambda: agent.seen("aborted", key), "aborted")
    eventually(lambda: blocks_in_use(engine) == 0, "the release of the blocks")
    assert not agent.seen("sealed", key)


def test_many_at_once_answer_as_one_by_one(engine: Engine, agent: Agent) -> None:
    """Loads, exports, decodes and aborts mixed, in blocks that are given from one to the next."""
    prompts = [prompt_of(random.Random(i).randint(2, 700), seed=20 + i) for i in range(12)]
    engine.reset_prefix_cache()
    alone = [tokens_of(engine.complete(prompt, max_tokens=12)) for prompt in prompts]
    engine.reset_prefix_cache()

    def split(prompt: list[int]) -> list[list[int]]:
        key = new_key()
        with ThreadPoolExecutor() as legs:
            consumer = legs.submit(consume, engine, prompt, key, max_tokens=12)
            engine.complete(prompt, max_tokens=1, kv_transfer_params=params("produce", key))
            return tokens_of(consumer.result(PATIENCE_SECONDS))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(split, prompts)) == alone
    eventually(lambda: blocks_in_use(engine) == 0, "the release of the blocks")


def test_the_engine_attaches_again_and_what_was_in_flight_fails(
    engine: Engine, agent: Agent
) -> None:
    prompt, key = prompt_of(100, seed=17), new_key()
    engine.reset_prefix_cache()
    aggregated = engine.complete(prompt, max_tokens=8)
    engine.reset_prefix_cache()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(consume, engine, prompt, key)
        agent.wait(lambda: agent.handoff(key).subscribed, "the subscription")
        agent.disconnect()
        error = waiting.exception(PATIENCE_SECONDS)
    assert error is not None and status_of(error) == 500
    agent.wait(lambda: agent.attachments == 2, "the second attachment")
    # Until the engine has mapped the new arena, it says of each handoff that it is void.
    for generation in itertools.count(1):
        again = new_key(generation)
        engine.complete(prompt, max_tokens=1, kv_transfer_params=params("produce", again))
        handoff = agent.handoff(again)
        agent.wait(lambda: handoff.sealed or agent.seen("aborted", again), "the seal")  # noqa: B023
        if handoff.sealed:
            break
    engine.reset_prefix_cache()
    assert tokens_of(consume(engine, prompt, again, max_tokens=8)) == tokens_of(aggregated)
