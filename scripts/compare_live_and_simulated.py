#!/usr/bin/env python3
"""Replays one trace on a live cluster of one prefill and one decode worker, and in `baton simulate`.

Starts `baton up` with the arguments after `--`, measures its engine (`baton profile`, one worker drained, no
request split) and what a handoff adds to a lone prompt's first token, replays a part of a trace of real traffic
with all requests split, and simulates the same with what was measured. Prints how far the simulation is off.

    cargo build --release -p baton
    scripts/compare_live_and_simulated.py target/release/baton --seconds 180 --kv-tokens 131072
    scripts/compare_live_and_simulated.py target/release/baton --seconds 300 --shrink 4 --scale 0.1 \\
        --max-model-len 2048 --max-sequences 8 --kv-tokens 5824 \\
        -- --engine vllm --vllm ~/.cache/baton/vllm --model ~/.cache/baton/model

Nothing else should use the machine meanwhile.
"""

import argparse
import csv
import datetime
import json
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import time

SAMPLE = pathlib.Path(__file__).parent.parent / "harness/samples/azure_conv.csv"
LONE_PROMPTS = [32, 256, 512, 1024]
LONE_REPEATS = 3
# The coordinator's own, which the simulated one is told too.
SLO = ["--slo-ttft-ms", "2000", "--slo-itl-ms", "50"]


class Cluster:
    """One that `baton up` started."""

    def __init__(self, baton: str, port: int, arguments: list[str], log: pathlib.Path):
        self.baton, self.url = baton, f"http://127.0.0.1:{port}"
        self.log = log.open("w")
        command = [baton, "up", "--port", str(port), *arguments]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)
        self.access: list[str] = []
        while not self.access:
            time.sleep(0.5)
            told = re.search(r"baton top (--admin \S+) (--token-file \S+)", log.read_text())
            if told:
                self.access = [*told[1].split(), *told[2].split()]
            elif self.process.poll() is not None:
                sys.exit(f"baton up ended:\n{log.read_text()}")

    def order(self, *order: str) -> None:
        run([self.baton, *order, *self.access])

    def bench(self, trace: pathlib.Path, out: pathlib.Path) -> tuple[dict, list[dict]]:
        """What `baton bench` sums up, and each request."""
        run([self.baton, "bench", "--url", self.url, "--trace", str(trace), *SLO, "--out", str(out)])
        with (out / "requests.csv").open() as file:
            return json.loads((out / "bench.json").read_text()), list(csv.DictReader(file))

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait()


def run(command: list[str]) -> str:
    """Its stdout; shows what the program says if it fails."""
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{ended.stdout}{ended.stderr}")
    return ended.stdout


def write_trace(file: pathlib.Path, requests: list[tuple[float, int, int]]) -> None:
    """Of milliseconds since the start, input tokens and output tokens."""
    names = ("timestamp", "input_length", "output_length")
    file.write_text("".join(json.dumps(dict(zip(names, request))) + "\n" for request in requests))


def shrunk(options: argparse.Namespace) -> list[tuple[float, int, int]]:
    """The sample, slower and with shorter requests."""
    with SAMPLE.open() as file:
        rows = list(csv.DictReader(file))
    moments = [datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]
    requests = []
    for row, moment in zip(rows, moments):
        at = (moment - moments[0]).total_seconds() / options.scale
        tokens = [max(1, int(row[name]) // options.shrink) for name in ("ContextTokens", "GeneratedTokens")]
        if at < options.seconds and sum(tokens) <= options.max_model_len:
            requests.append((round(1000 * at, 3), *tokens))
    return requests


def lone_ttfts_ms(cluster: Cluster, directory: pathlib.Path, mode: str) -> dict[int, float]:
    """Median TTFT of prompts that have the cluster to themselves, by their length."""
    cluster.order("mode", mode)
    trace = directory / "lone.jsonl"
    lengths = [length for _ in range(LONE_REPEATS) for length in LONE_PROMPTS]
    # A prompt of the longest is through before the next one comes.
    pause_ms = 1.5 * cluster.lone_ms + 100
    write_trace(trace, [(round(pause_ms * turn, 3), length, 2) for turn, length in enumerate(lengths)])
    _, rows = cluster.bench(trace, directory / f"lone-{mode}")
    by_length = {length: [] for length in LONE_PROMPTS}
    for row in rows:
        by_length[int(row["input_tokens"])].append(float(row["ttft_ms"]))
    return {length: statistics.median(ttfts) for length, ttfts in by_length.items()}


def measured_link(cluster: Cluster, directory: pathlib.Path, profile: dict) -> tuple[float, float]:
    """Milliseconds that a handoff adds to a first token, and microseconds for each of its tokens."""
    whole, split = (lone_ttfts_ms(cluster, directory, mode) for mode in ("aggregated", "disaggregated"))
    [fixed, each, context] = profile["decode_ms"]
    # The first token is the decode worker's first step.
    added = [split[length] - whole[length] - (fixed + each + context * length) for length in LONE_PROMPTS]
    for length, ms in zip(LONE_PROMPTS, added):
        print(f"a handoff of {length} tokens adds {ms:.2f} ms to its first token, beside decode's step")
    slope, intercept = statistics.linear_regression(LONE_PROMPTS, added)
    if slope < 0 or intercept < 0:
        slope, intercept = 0.0, max(0.0, statistics.mean(added))
    return intercept, 1000 * slope


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="After -- come arguments for `baton up`.")
    parser.add_argument("baton", help="the program")
    parser.add_argument("--seconds", type=float, default=180, help="of arrivals")
    parser.add_argument("--scale", type=float, default=1, help="times the sample's rate")
    parser.add_argument("--shrink", type=int, default=1, help="divides the sample's token counts")
    parser.add_argument("--max-model-len", type=int, default=32768, help="longer requests are left out")
    parser.add_argument("--max-sequences", type=int, default=256, help="that the engine computes in one step")
    parser.add_argument("--kv-tokens", type=int, required=True, help="that fit into the engine's KV cache")
    parser.add_argument("--port", type=int, default=18420)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("live-and-simulated"))
    own, more = sys.argv[1:], []
    if "--" in own:
        own, more = own[: own.index("--")], own[own.index("--") + 1 :]
    options = parser.parse_args(own)
    options.out.mkdir(parents=True, exist_ok=True)
    trace = options.out / "trace.jsonl"
    requests = shrunk(options)
    write_trace(trace, requests)

    cluster = Cluster(options.baton, options.port, more, options.out / "up.log")
    try:
        # One engine, and all of it.
        cluster.order("mode", "aggregated")
        cluster.order("drain", "decode-0")
        profile_file = options.out / "measured.json"
        longest, most = min(options.max_model_len, 2048), min(options.max_sequences, 16)
        print(run([
            options.baton, "profile", "--url", cluster.url, "--out", str(profile_file),
            "--max-model-len", str(longest), "--max-sequences", str(most),
        ]))  # fmt: skip
        cluster.order("drain", "decode-0", "--undrain")
        profile = json.loads(profile_file.read_text())
        [fixed, each, square] = profile["prefill_ms"]
        cluster.lone_ms = fixed + each * max(LONE_PROMPTS) + square * max(LONE_PROMPTS) ** 2
        latency_ms, us_per_token = measured_link(cluster, options.out, profile)
        cluster.order("mode", "disaggregated")
        live, _ = cluster.bench(trace, options.out / "live")
    finally:
        cluster.stop()

    profile_file.write_text(json.dumps(profile | {"kv_capacity_tokens": options.kv_tokens}))
    simulate = [
        options.baton, "simulate", "--trace", str(trace), "--profile", str(profile_file), "--workers", "2",
        "--mode", "static:1P1D", "--late", "last", "--max-sequences", str(options.max_sequences),
        "--link-latency-ms", f"{latency_ms:.3f}", "--link-us-per-token", f"{us_per_token:.3f}", *SLO,
    ]  # fmt: skip
    print(" ".join(simulate))
    simulated = json.loads(run([*simulate, "--json"]))

    print(f"\n{len(requests)} requests; live {live['completed']} completed, {live['disaggregated']} split")
    print(f"{'':<20} {'live':>10} {'simulated':>10} {'off by':>8}")
    for name, unit in (("ttft_ms", "TTFT"), ("tpot_ms", "ITL, mean"), ("tbt_ms", "ITL, TBT"), ("e2e_ms", "E2E")):
        for percentile in ("p50", "p90"):
            show(f"{unit} {percentile}, ms", live[name][percentile], simulated[name][percentile])
    show("output tokens/s", live["output_tokens_per_s"], simulated["output_tokens_per_s"])
    for warning in live["client"]["warnings"]:
        print(f"baton bench warns: {warning}")
    return 0


def show(name: str, live: float, simulated: float) -> None:
    print(f"{name:<20} {live:>10.2f} {simulated:>10.2f} {simulated / live - 1:>+8.1%}")


if __name__ == "__main__":
    sys.exit(main())
