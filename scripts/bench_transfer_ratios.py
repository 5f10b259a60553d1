#!/usr/bin/env python3
"""How fast Baton's channels are beside what they are built on: ratios, each of one run, the two sides in turns.

    cargo build --release -p baton -p baton-transfer --bins --examples
    scripts/bench_transfer_ratios.py target/release --ucx FOLDER      (made by scripts/install-ucx.sh)

Beside `ucx_perftest`, TLS over TCP and quinn as it comes, blocks are placed, verified and acknowledged; those
three only move them. NIXL and Mooncake are measured where their folder is given:

    pip install --no-deps --target FOLDER nixl-cu12 numpy mooncake-transfer-engine-non-cuda
    (and, for Mooncake, Debian's libibverbs1 and librdmacm1)
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time

BLOCKS = {"64 KiB": 64 << 10, "1 MiB": 1 << 20}


def baton(arguments, channel, block, mtu=6500, streams=1):
    command = [
        os.path.join(arguments.programs, "baton"), "bench-transfer", "--channel", channel, "--block",
        str(block), "--bytes", str(arguments.bytes), "--mtu", str(mtu), "--streams", str(streams),
        "--rounds", "3", "--json",
    ]
    environment = dict(os.environ)
    if channel == "ucx":
        environment["BATON_UCX_LIBRARY"] = os.path.join(arguments.ucx, "libucx/lib/libucp.so.0")
        environment.setdefault("UCX_TLS", "tcp,self")
        environment.setdefault("UCX_NET_DEVICES", "lo")
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = [line for line in said.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1])


def ucx_perftest(arguments, block, *options):
    """GB/s of one-sided writes over tcp, as UCX measures itself."""
    folder = os.path.join(arguments.ucx, "libucx")
    environment = dict(os.environ, UCX_TLS="tcp,self", UCX_NET_DEVICES="lo", UCX_WARN_UNUSED_ENV_VARS="n")
    environment["LD_LIBRARY_PATH"] = os.path.join(folder, "lib")
    program = os.path.join(folder, "bin/ucx_perftest")
    port = str(20000 + os.getpid() % 10000)
    server = subprocess.Popen(
        [program, "-p", port, *options], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    time.sleep(0.5)
    count = max(arguments.bytes // block, 200)
    command = [
        program, "-p", port, "-t", "ucp_put_bw", "-s", str(block), "-n", str(count), "-w", "50",
        *options, "127.0.0.1",
    ]
    try:
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    finally:
        server.kill()
        server.wait()
    final = [line for line in said.stdout.splitlines() if line.startswith("Final:")][-1]
    # Final: iterations, three latencies, average and overall MB/s (of 2^20), …
    overall = [float(field) for field in re.findall(r"\d+\.\d+", final)][4]
    return overall * (1 << 20) / 1e9


def baseline(arguments, name, block):
    command = [
        os.path.join(arguments.programs, "examples/baselines"), name, str(block), str(arguments.bytes)
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(said.stdout.strip())


def other(arguments, name, block):
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bench_transfer_others.py")
    environment = dict(os.environ, PYTHONPATH=arguments.others)
    said = subprocess.run(
        [sys.executable, script, name, str(block), str(arguments.bytes)],
        env=environment, capture_output=True, text=True, check=True,
    )
    return float(said.stdout.strip().splitlines()[-1])


def compare(arguments, ours, theirs):
    """Medians of both and of their ratios, taken in turns."""
    pairs = [(ours(), theirs()) for _ in range(arguments.rounds)]
    mine = statistics.median(pair[0]["gb_per_s"] for pair in pairs)
    others = statistics.median(pair[1] for pair in pairs)
    trips = statistics.median(pair[0]["small_handoff_round_trips"] for pair in pairs)
    # What else the machine does meanwhile shows in how far the turns are apart.
    ratios = sorted(pair[0]["gb_per_s"] / pair[1] for pair in pairs)
    return {
        "gb_per_s": mine, "against_gb_per_s": others, "ratio": statistics.median(ratios),
        "ratio_least": ratios[0], "ratio_most": ratios[-1], "small_handoff_round_trips": trips,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", help="the folder of the release build")
    parser.add_argument("--ucx", help="the folder that scripts/install-ucx.sh made")
    parser.add_argument("--others", help="the folder of nixl and mooncake")
    parser.add_argument("--bytes", type=int, default=512 << 20)
    parser.add_argument("--rounds", type=int, default=3, help="turns, of several rounds each")
    parser.add_argument("--only", help="names that begin so")
    arguments = parser.parse_args()
    rows = []
    for name, block in BLOCKS.items():
        def shm(block=block):
            return [baton(arguments, "shm", block) for _ in range(arguments.rounds)]

        def of_way(reports, prefix):
            median = lambda key: statistics.median(report[key] for report in reports)
            ratios = [report[prefix + "ratio_to_memcpy"] for report in reports]
            return {
                "gb_per_s": median(prefix + "gb_per_s"), "against_gb_per_s": median("memcpy_gb_per_s"),
                "ratio": statistics.median(ratios), "ratio_least": min(ratios), "ratio_most": max(ratios),
                "consumer_cpu_s_per_gb": median(prefix + "consumer_cpu_s_per_gb"),
                "producer_cpu_s_per_gb": median(prefix + "producer_cpu_s_per_gb"),
                "small_handoff_round_trips": median(prefix + "small_handoff_round_trips"),
            }

        def row(what, against, measure, block=name):
            title = f"{what} against {against}"
            if arguments.only is None or title.startswith(arguments.only):
                measured = measure()
                rows.append({"path": what, "against": against, "block": block, **measured})
                print(json.dumps(rows[-1]), flush=True)

        reports = []  # Both rows are of the same runs.
        shm_once = lambda shm=shm, reports=reports: reports or reports.extend(shm()) or reports
        row("shm copied", "memcpy", lambda: of_way(shm_once(), ""))
        # Nothing is copied: they are verified in the producer's arena, and let go of.
        row("shm mapped", "memcpy", lambda: of_way(shm_once(), "mapped_"))
        if arguments.ucx:
            ucx = lambda block=block: baton(arguments, "ucx", block)
            row("ucx tcp", "ucx_perftest tcp put",
                lambda: compare(arguments, ucx, lambda: ucx_perftest(arguments, block)))
            # As Baton writes: so that a peer that dies is noticed.
            row("ucx tcp", "ucx_perftest tcp put, failing peers noticed",
                lambda: compare(arguments, ucx, lambda: ucx_perftest(arguments, block, "-e")))
        quic = lambda mtu, streams=1, block=block: lambda: baton(arguments, "quic", block, mtu, streams)
        row("quic MTU 6500", "TLS 1.3 over TCP, 1 stream",
            lambda: compare(arguments, quic(6500), lambda: baseline(arguments, "tls", block)))
        row("quic MTU 6500", "quinn set up alike",
            lambda: compare(arguments, quic(6500), lambda: baseline(arguments, "quinn-6500", block)))
        row("quic MTU 1452", "quinn as it comes",
            lambda: compare(arguments, quic(1452), lambda: baseline(arguments, "quinn", block)))
        if arguments.others:
            row("quic MTU 6500", "Mooncake tcp",
                lambda: compare(arguments, quic(6500), lambda: other(arguments, "mooncake", block)))
            if arguments.ucx:
                row("ucx tcp", "NIXL tcp, tuned",
                    lambda: compare(arguments, ucx, lambda: other(arguments, "nixl", block)))


if __name__ == "__main__":
    main()
