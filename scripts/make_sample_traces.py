#!/usr/bin/env python3
"""Cuts the sample traces of harness/samples/ out of the published ones.

    scripts/make_sample_traces.py AzureLLMInferenceTrace_code.csv AzureLLMInferenceTrace_conv.csv \
        conversation_trace.jsonl harness/samples

harness/samples/README.md says where these files come from.
"""

import json
import pathlib
import sys
from datetime import datetime

AZURE_REQUESTS = 2000
MOONCAKE_REQUESTS = 1000
# Of the composite: how often code and conversation take turns, for how long, and how much faster than
# published, so that both load a few workers.
TURNS = 2
PHASE_S = 45
SPEED = {"code": 4.0, "conv": 3.2}


def first_lines(source: pathlib.Path, lines: int, target: pathlib.Path) -> None:
    with source.open(newline="") as file:
        text = "".join(line for _, line in zip(range(lines), file))
    target.write_text(text.replace("\r\n", "\n"))


def azure(source: pathlib.Path) -> list[tuple[float, int, int]]:
    """Seconds since the first request, input tokens, output tokens."""
    rows = [line.split(",") for line in source.read_text().splitlines()[1:]]
    # Python knows microseconds; the traces have a digit more.
    stamps = [datetime.fromisoformat(row[0][:26]) for row in rows]
    return [
        ((stamp - stamps[0]).total_seconds(), int(row[1]), int(row[2]))
        for stamp, row in zip(stamps, rows)
    ]


def composite(traces: dict[str, list[tuple[float, int, int]]]) -> list[str]:
    lines = []
    for turn in range(TURNS):
        for place, (phase, trace) in enumerate(traces.items()):
            start_s = (turn * len(traces) + place) * PHASE_S
            taken_s = turn * PHASE_S * SPEED[phase]
            for at_s, input_tokens, output_tokens in trace:
                into_phase_s = (at_s - taken_s) / SPEED[phase]
                if 0 <= into_phase_s < PHASE_S:
                    request = {
                        "timestamp": round((start_s + into_phase_s) * 1000),
                        "input_length": input_tokens,
                        "output_length": output_tokens,
                        "phase": phase,
                    }
                    lines.append(json.dumps(request, separators=(",", ":")))
    return lines


def main() -> None:
    code, conv, mooncake, target = map(pathlib.Path, sys.argv[1:])
    first_lines(code, AZURE_REQUESTS + 1, target / "azure_code.csv")
    first_lines(conv, AZURE_REQUESTS + 1, target / "azure_conv.csv")
    first_lines(mooncake, MOONCAKE_REQUESTS, target / "mooncake_conversation.jsonl")
    lines = composite({"code": azure(code), "conv": azure(conv)})
    (target / "azure_code_conv_phases.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
