"""How much of a prompt a step may take in, so that the decodes in it keep their pace. Arithmetic
alone: the same as ``StepModel`` and ``PrefillPace`` on the worker's side."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

MIN_CHUNK_TOKENS = 32
"""Smaller chunks cost more than they bring. Also what each step takes in where there is no time left:
a prompt that waits for idle decodes might wait for ever."""
LARGEST = 1e100
"""Beyond any time in milliseconds, and its squares are numbers still."""


@dataclass(frozen=True, slots=True)
class Pace:
    step_ms: float
    """A step with decodes in it shall end within this time."""
    prefill_ms: tuple[float, float, float]
    """A prefill of n tokens takes ``a + b * n + c * n**2`` milliseconds."""
    decode_ms: tuple[float, float, float]
    """A decode step takes ``a + b * sequences + c * context tokens`` milliseconds."""
    interference: float
    """What a prefill costs beside decodes, as a part of what it costs alone."""

    @staticmethod
    def read(wire: dict[str, Any] | None) -> "Pace | None":
        """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where it is none."""
        if wire is None:
            return None
        model = wire["model"]
        return Pace(
            _number(wire["step_ms"]),
            _three(model["prefill_ms"]),
            _three(model["decode_ms"]),
            _number(model["prefill_interference_factor"]),
        )

    def decode_step_ms(self, sequences: int, context_tokens: int) -> float:
        fixed, per_sequence, per_context_token = self.decode_ms
        return fixed + per_sequence * sequences + per_context_token * context_tokens

    def prefill_tokens(
        self, sequences: int, context_tokens: int, prompts: Iterable[tuple[int, int]]
    ) -> int:
        """How many tokens of the prompts, each given as (computed, remaining) and in their order,
        fit into a step beside these decodes."""
        slack_ms = self.step_ms - self.decode_step_ms(sequences, context_tokens)
        work_ms = slack_ms / max(self.interference, 1e-3)
        total = 0
        for computed, remaining in prompts:
            tokens = min(remaining, self._tokens_within(work_ms, computed))
            if tokens < remaining and tokens < MIN_CHUNK_TOKENS:
                break
            total += tokens
            work_ms -= self._work_ms(computed, computed + tokens)
            if tokens < remaining:
                break
        return max(total, MIN_CHUNK_TOKENS)

    def _work_ms(self, first: int, end: int) -> float:
        _, per_token, per_square = self.prefill_ms
        return per_token * (end - first) + per_square * (end * end - first * first)

    def _tokens_within(self, work_ms: float, first: int) -> int:
        _, per_token, per_square = self.prefill_ms
        if work_ms <= 0:
            return 0
        slope = per_token + 2 * per_square * first
        root = slope + math.sqrt(slope * slope + 4 * per_square * work_ms)
        return min(int(2 * work_ms / root), 1 << 30) if root > 0 else 1 << 30


def _three(values: Any) -> tuple[float, float, float]:
    first, second, third = map(_number, values)
    return first, second, third


def _number(value: Any) -> float:
    """What may stand in a pace: times and their factors. None is so large that sums of them are none."""
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError("a number without end") from error
    if not 0 <= number <= LARGEST:
        raise ValueError(f"{number} can neither be a time nor a factor")
    return number
