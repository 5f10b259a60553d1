"""How much of a prompt a step takes in: the arithmetic, without vLLM."""

import math
import random

import pytest

from baton_connector.pacing import MIN_CHUNK_TOKENS, Pace

WIRE = {
    "step_ms": 50.0,
    "model": {
        "prefill_ms": [10.0, 0.1, 1e-5],
        "decode_ms": [20.0, 0.5, 1e-3],
        "prefill_interference_factor": 0.5,
    },
}


def pace(**changes) -> Pace:
    read = Pace.read({**WIRE, "model": {**WIRE["model"], **changes}})
    assert read is not None
    return read


def test_a_step_with_its_prefill_ends_in_time_and_one_more_token_would_not() -> None:
    chooser = random.Random(1)
    for _ in range(500):
        sequences, context = chooser.randint(1, 20), chooser.randint(0, 10_000)
        first, p = chooser.randint(0, 20_000), pace()

        def step_ms(tokens: int) -> float:
            work = 0.1 * tokens + 1e-5 * ((first + tokens) ** 2 - first**2)  # noqa: B023
            return 20 + 0.5 * sequences + 1e-3 * context + 0.5 * work  # noqa: B023

        tokens = p.prefill_tokens(sequences, context, [(first, 10**9)])
        if tokens > MIN_CHUNK_TOKENS:
            assert step_ms(tokens) <= 50 + 1e-9 < step_ms(tokens + 1)
        else:
            assert step_ms(MIN_CHUNK_TOKENS + 1) > 50


def test_prompts_share_a_step_in_their_order() -> None:
    # 200 ms of prefill work: 2000 tokens at 0.1 ms.
    p = pace(prefill_ms=[10.0, 0.1, 0.0], decode_ms=[0.0, 0.0, 0.0], prefill_interference_factor=0.25)
    assert p.prefill_tokens(1, 0, [(0, 500), (0, 300)]) == 800
    assert p.prefill_tokens(1, 0, [(0, 1990), (0, 300)]) == 1990, "ten tokens are no chunk"
    assert p.prefill_tokens(1, 0, [(0, 1990), (0, 10)]) == 2000, "unless they are a whole prompt"
    assert p.prefill_tokens(1, 0, [(0, 1900), (0, 9000)]) == 2000


def test_a_prompt_always_gets_on() -> None:
    for slow in ([60.0, 0.0, 0.0], [0.0, 0.0, 1.0]):
        assert pace(decode_ms=slow).prefill_tokens(9, 9000, [(0, 500)]) == MIN_CHUNK_TOKENS
    free = pace(prefill_ms=[0.0, 0.0, 0.0])
    assert free.prefill_tokens(1, 0, [(0, 500), (0, 10**6)]) == 10**6 + 500


def test_what_is_no_pace_is_refused() -> None:
    assert Pace.read(None) is None
    for field, value in [("decode_ms", [1, 2]), ("prefill_ms", [1, -2, 3]), ("decode_ms", "123x")]:
        with pytest.raises(ValueError):
            pace(**{field: value})
    with pytest.raises(ValueError):
        Pace.read({**WIRE, "step_ms": math.nan})
    with pytest.raises(KeyError):
        Pace.read({"step_ms": 1.0})
