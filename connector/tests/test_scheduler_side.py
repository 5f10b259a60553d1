from types import SimpleNamespace

import pytest
from fakes import KEY, OTHER_KEY, request, step
from vllm.v1.request import RequestStatus

from baton_connector.handoff import prompt_digest
from baton_connector.plan import WorkerReport
from baton_connector.scheduler_side import SchedulerSide

BLOCK = 32
MANY_SLOTS = 1000


@pytest.fixture
def side() -> SchedulerSide:
    side = SchedulerSide(BLOCK)
    report(side, 0, MANY_SLOTS)
    return side


def report(side: SchedulerSide, seq: int, free_slots: int) -> None:
    output(side, worker=WorkerReport(seq, free_slots))


def output(side, *, received=(), failed=(), worker=None) -> None:
    side.worker_output(
        SimpleNamespace(
            kv_connector_worker_meta=worker,
            finished_recving=set(received),
            failed_recving=set(failed),
        )
    )


def run(side: SchedulerSide, producer, tokens: int, block_ids: list[int]):
    """One step of one request; vLLM counts its tokens after it has asked for the plan."""
    plan = side.build_plan(step({producer.request_id: tokens}, {producer.request_id: block_ids}))
    producer.num_computed_tokens += tokens
    return plan


def finish(side: SchedulerSide, ended, status=RequestStatus.FINISHED_LENGTH_CAPPED) -> bool:
    ended.status = status
    return side.finished(ended)


# Producing


def test_a_chunked_prompt_is_announced_block_by_block_and_sealed(side: SchedulerSide) -> None:
    producer = request(tokens=100)
    side.new_request(producer)
    first = run(side, producer, 40, [7, 8])
    assert [e.blocks for e in first.exports] == [[(0, 7)]] and first.exports[0].seal is None
    second = run(side, producer, 40, [7, 8, 9])
    assert second.exports[0].blocks == [(1, 8)]
    last = run(side, producer, 20, [7, 8, 9, 10])
    assert last.exports[0].blocks == [(2, 9), (3, 10)]
    seal = last.exports[0].seal
    assert seal and (seal.prompt_tokens, seal.cached_tokens) == (100, 0)
    assert seal.prompt_digest == prompt_digest(producer)
    assert not run(side, producer, 1, [7, 8, 9, 10]).exports, "decoding exports nothing"
    assert finish(side, producer) is False
    (end,) = side.build_plan(step()).export_ends
    assert (end.key, end.aborted, end.held) == (KEY, False, False)


@pytest.mark.parametrize("tokens,blocks", [(31, 1), (32, 1), (33, 2), (64, 2), (1, 1)])
def test_the_last_block_may_be_partial(side: SchedulerSide, tokens: int, blocks: int) -> None:
    producer = request(tokens=tokens)
    side.new_request(producer)
    (export,) = run(side, producer, tokens, list(range(9))).exports
    assert len(export.blocks) == blocks and export.seal


def test_blocks_from_the_prefix_cache_are_exported_at_once(side: SchedulerSide) -> None:
    producer = request(tokens=100, num_computed_tokens=64)
    side.new_request(producer)
    (export,) = run(side, producer, 8, [5, 6, 7]).exports
    assert export.blocks == [(0, 5), (1, 6)]
    (export,) = run(side, producer, 28, [5, 6, 7, 8]).exports
    assert export.seal and export.seal.cached_tokens == 64


def test_after_a_preemption_all_is_announced_again_in_its_new_place(side: SchedulerSide) -> None:
    producer = request(tokens=100)
    side.new_request(producer)
    run(side, producer, 100, [1, 2, 3, 4])
    producer.num_computed_tokens = 0
    assert side.build_plan(step(preempted=("r",))).withdrawn == ["r"]
    (export,) = run(side, producer, 100, [11, 12, 13, 14]).exports
    assert export.blocks == [(0, 11), (1, 12), (2, 13), (3, 14)] and export.seal


def test_blocks_are_held_only_where_slots_might_have_run_out(side: SchedulerSide) -> None:
    def produce(req_id: str, key) -> bool:
        producer = request(req_id, tokens=64, key=key)
        side.new_request(producer)
        (export,) = run(side, producer, 64, [1, 2]).exports
        held = finish(side, producer)
        assert export.last_chance is not held
        return held

    report(side, 0, 3)
    assert produce("a", KEY) is False
    assert produce("b", OTHER_KEY) is True
    assert side.build_plan(step()).export_ends[0].held
    report(side, 3, 2)
    assert produce("c", KEY._replace(generation=1)) is False


def test_the_first_producer_is_held_until_a_report_has_come() -> None:
    side = SchedulerSide(BLOCK)
    producer = request(tokens=10)
    side.new_request(producer)
    run(side, producer, 10, [1])
    assert finish(side, producer) is True


@pytest.mark.parametrize("computed", [0, 40, 100])
@pytest.mark.parametrize("status", [RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR])
def test_an_aborted_producer_holds_nothing(side: SchedulerSide, computed: int, status) -> None:
    producer = request(tokens=100)
    side.new_request(producer)
    if computed:
        run(side, producer, computed, [1, 2, 3, 4])
    assert finish(side, producer, status) is False
    assert finish(side, producer, status) is False
    (end,) = side.build_plan(step()).export_ends
    assert end.aborted and not side.build_plan(step()).export_ends


def test_requests_without_a_part_are_left_alone(side: SchedulerSide) -> None:
    plain = request(role=None)
    malformed = request("m", kv_transfer_params={"baton": {"role": "produce"}})
    for one in (plain, malformed):
        side.new_request(one)
        assert side.matched_tokens(one, 0) == (0, False)
        side.allocated(one, [1, 2, 3, 4], 0)
    plan = side.build_plan(step({"r": 100, "m": 100}, {"r": [1], "m": [2]}))
    assert not (plan.exports or plan.subscribes or plan.notices)
    assert finish(side, plain) is False and finish(side, malformed) is False
    assert finish(side, request("unknown")) is False
    assert not side.build_plan(step()).export_ends


def test_a_second_producer_of_the_same_handoff_exports_nothing(side: SchedulerSide) -> None:
    """Be it another choice, or the request that vLLM makes up to tell of a rejected one."""
    side.new_request(request("a"))
    side.new_request(request("b"))
    plan = side.build_plan(step({"a": 100, "b": 100}, {"a": [1, 2, 3, 4], "b": [5, 6, 7, 8]}))
    assert [e.req_id for e in plan.exports] == ["a"]
    assert finish(side, request("b"), RequestStatus.FINISHED_ABORTED) is False
    assert not side.build_plan(step()).export_ends


@pytest.mark.parametrize("cached", [96, 64])
def test_only_what_is_cached_is_lent(side: SchedulerSide, cached: int) -> None:
    lender = request(tokens=97, role="lend")
    side.new_request(lender)
    if cached == 64:
        for _ in range(3):
            assert side.matched_tokens(lender, cached) == (None, False)
        assert side.build_plan(step()).notices == [("aborted", KEY)]
        assert finish(side, lender, RequestStatus.FINISHED_ABORTED) is False
        plan = side.build_plan(step())
        assert not (plan.notices or plan.export_ends)
        return
    assert side.matched_tokens(lender, cached) == (0, False)
    lender.num_computed_tokens = cached
    (export,) = run(side, lender, 1, [1, 2, 3, 4]).exports
    assert export.blocks == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert export.seal and (export.seal.prompt_tokens, export.seal.cached_tokens) == (97, 96)
    # What it has begun it brings to its end.
    assert side.matched_tokens(lender, 0) == (0, False)
    assert finish(side, lender) is False


# Consuming


def admit(side: SchedulerSide, consumer, computed: int, block_ids: list[int]):
    tokens, asynchronous = side.matched_tokens(consumer, computed)
    assert tokens is not None and asynchronous is (tokens > 0)
    side.allocated(consumer, block_ids, tokens)
    return side.build_plan(step())


def test_a_consumer_waits_for_all_that_it_has_not(side: SchedulerSide) -> None:
    consumer = request(role="consume", tokens=100)
    side.new_request(consumer)
    assert side.matched_tokens(consumer, 64) == side.matched_tokens(consumer, 64) == (36, True)
    (subscribe,) = admit(side, consumer, 64, [1, 2, 3, 4, 5]).subscribes
    assert (subscribe.key, subscribe.first_block, subscribe.block_ids) == (KEY, 2, [3, 4])
    assert (subscribe.prompt_tokens, subscribe.prompt_digest) == (100, prompt_digest(consumer))
    output(side, received=["r"])
    side.allocated(consumer, [1, 2, 3, 4, 5], 0)
    assert side.matched_tokens(consumer, 0) == (0, False), "preempted: the handoff is past"
    finish(side, consumer)
    plan = side.build_plan(step())
    assert not (plan.notices or plan.load_ends or plan.subscribes)


def test_one_missing_token_needs_no_handoff(side: SchedulerSide) -> None:
    consumer = request(role="consume", tokens=65)
    side.new_request(consumer)
    assert side.matched_tokens(consumer, 64) == (0, False)
    assert not side.build_plan(step()).notices, "it has no blocks yet"
    assert admit(side, consumer, 64, [1, 2, 3]).notices == [("not_needed", KEY)]
    side.allocated(consumer, [1, 2, 3], 0)
    finish(side, consumer)
    assert not side.build_plan(step()).notices


def test_a_prompt_that_vllm_computes_anyway_gives_its_handoff_up(side: SchedulerSide) -> None:
    consumer = request(role="consume", skip_reading_prefix_cache=True)
    side.new_request(consumer)
    side.matched_tokens(consumer, 0)
    side.allocated(consumer, [1, 2, 3, 4], 0)
    assert side.build_plan(step()).notices == [("aborted", KEY)]


def test_a_malformed_consumer_waits_to_be_failed(side: SchedulerSide) -> None:
    consumer = request(kv_transfer_params={"baton": {"role": "consume"}})
    side.new_request(consumer)
    assert admit(side, consumer, 0, [1, 2, 3, 4]).subscribes[0].key is None


def test_an_abort_tells_once_wherever_it_comes(side: SchedulerSide) -> None:
    queued = request("queued", role="consume")
    side.new_request(queued)
    for _ in range(2):
        finish(side, queued, RequestStatus.FINISHED_ABORTED)
    assert side.build_plan(step()).notices == [("aborted", KEY)]

    loading = request("loading", role="consume", key=OTHER_KEY)
    side.new_request(loading)
    admit(side, loading, 0, [1, 2, 3, 4])
    assert finish(side, loading, RequestStatus.FINISHED_ABORTED) is False
    plan = side.build_plan(step())
    assert plan.load_ends == ["loading"] and not plan.notices

    for key in (KEY, OTHER_KEY):
        made_up = request("made-up", role="consume", key=key)
        side.new_request(made_up)
        finish(side, made_up, RequestStatus.FINISHED_ABORTED)
    plan = side.build_plan(step())
    assert not (plan.notices or plan.load_ends)


@pytest.mark.parametrize("cached,failed", [(96, False), (64, False), (96, True)])
def test_other_choices_wait_for_the_first_and_never_compute_more_than_a_block(
    side: SchedulerSide, cached: int, failed: bool
) -> None:
    first, second = request("1", role="consume"), request("2", role="consume")
    side.new_request(first)
    side.new_request(second)
    admit(side, first, 0, [1, 2, 3, 4])
    assert side.matched_tokens(second, 0) == (None, False)
    output(side, received=["1"], failed=["1"] if failed else [])
    if not failed and 100 - cached <= BLOCK:
        assert side.matched_tokens(second, cached) == (0, False)
    else:
        assert admit(side, second, cached, [1, 2, 3, 4]).subscribes[0].key is None
