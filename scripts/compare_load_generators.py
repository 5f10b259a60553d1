#!/usr/bin/env python3
"""Holds `baton bench` against guidellm, a public load generator, on the same endpoint.

    python3 -m venv ~/.cache/baton/guidellm && ~/.cache/baton/guidellm/bin/pip install guidellm
    baton up &
    scripts/compare_load_generators.py --url http://127.0.0.1:8000 \
        --guidellm ~/.cache/baton/guidellm/bin/guidellm --tokenizer ~/.cache/baton/model

Both send requests at a constant rate and take turns, guidellm first. Its prompts are texts, which a
server's tokenizer may cut otherwise than guidellm's: `baton bench` then replays a trace of the lengths
that the server counted. Medians of TTFT (first byte of an answer's first token since the request) and
of ITL (a request's mean gap) are compared over all rounds together; they should agree within 5 %.
"""

import argparse
import csv
import json
import pathlib
import secrets
import statistics
import subprocess
import sys
import tempfile

TOLERANCE = 0.05


def run(command: list[str]) -> None:
    """Shows what a program says only if it fails."""
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ended.returncode:
        sys.exit(f"{command[0]} failed:\n{ended.stdout}")


def guidellm(options: argparse.Namespace, directory: pathlib.Path) -> list[dict]:
    report = directory / "guidellm.json"
    shape = f"prompt_tokens={options.input_tokens},output_tokens={options.output_tokens}"
    command = [
        *(options.guidellm, "run", "--disable-console"),
        *("--backend", f"kind=openai_http,target={options.url},request_format=/v1/completions"),
        *("--profile", f"kind=constant,rate={options.rate}"),
        *("--constraint", f"kind=max_requests,count={options.requests}"),
        *("--data", f"kind=synthetic_text,{shape}"),
        *("--tokenizer", f"kind=huggingface_auto,model={options.tokenizer}"),
        # Prompts that no round before has left in a prefix cache.
        *("--seed", f"kind=static,value={secrets.randbelow(1 << 31)}"),
        *("--output", f"kind=json,path={report}"),
    ]
    run(command)
    requests = json.loads(report.read_text())["benchmarks"][0]["requests"]["successful"]
    return [
        {
            "input_tokens": request["prompt_tokens"],
            "output_tokens": request["output_tokens"],
            "ttft_ms": request["time_to_first_token_ms"],
            "itl_ms": request["inter_token_latency_ms"],
        }
        for request in requests
    ]


def baton(options: argparse.Namespace, like: list[dict], directory: pathlib.Path) -> list[dict]:
    trace = directory / "trace.jsonl"
    lines = [
        {
            "timestamp": 1000 * index / options.rate,
            "input_length": request["input_tokens"],
            "output_length": request["output_tokens"],
        }
        for index, request in enumerate(like)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    command = [options.baton, "bench", "--url", options.url, "--trace", str(trace), "--out", str(directory)]
    run(command)
    for warning in json.loads((directory / "bench.json").read_text())["client"]["warnings"]:
        print(f"  baton bench warns: {warning}")
    with (directory / "requests.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["fate"] == "completed"]
    return [
        {
            "input_tokens": int(row["input_tokens"]),
            "output_tokens": int(row["output_tokens"]),
            "ttft_ms": float(row["ttft_ms"]),
            "itl_ms": float(row["tpot_ms"]),
        }
        for row in rows
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--guidellm", default="guidellm", help="the program")
    parser.add_argument("--baton", default="baton", help="the program")
    parser.add_argument("--tokenizer", required=True, help="for guidellm: a Hugging Face name or directory")
    parser.add_argument("--rate", type=float, default=2.0, help="requests per second")
    parser.add_argument("--requests", type=int, default=40, help="in each round")
    parser.add_argument("--input-tokens", type=int, default=200)
    parser.add_argument("--output-tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    theirs, ours = [], []
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(options.rounds):
            round_of_theirs = guidellm(options, pathlib.Path(directory))
            theirs += round_of_theirs
            ours += baton(options, round_of_theirs, pathlib.Path(directory))
    agree = True
    print(f"{'median':<14} {'guidellm':>10} {'baton':>10} {'differ':>8}")
    for field in ("input_tokens", "output_tokens", "ttft_ms", "itl_ms"):
        of_theirs, of_ours = (statistics.median(request[field] for request in all_of) for all_of in (theirs, ours))
        difference = of_ours / of_theirs - 1
        agree &= abs(difference) <= TOLERANCE
        print(f"{field:<14} {of_theirs:>10.2f} {of_ours:>10.2f} {difference:>+8.1%}")
    print(f"of {len(theirs)} and {len(ours)} requests")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
