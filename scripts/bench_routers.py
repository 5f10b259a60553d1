#!/usr/bin/env python3
"""The coordinator beside other routers: the same load and the same fake engines, in one run.

    bench_routers.py PEERS DIR [--rounds 3] [--seconds 3] [--baton target/release/baton] [--parts]

PEERS  a folder with run.sh, which installs the routers, the fake engines and the load generator, and
       starts, loads and stops one of them at a time (`run.sh install DIR` comes first)
DIR    where it installed them

Engines and load run on core 0, the router under test on core 1, one router at a time, rounds interleaved.
Baton runs three times: with its workers on the engines' core, on the coordinator's, and in the
coordinator's process. Figures are medians; CPU is that of the router's process alone, the workers' stands
beside it where they have processes of their own. Absolute figures drift with the machine: quote ratios of
one run.

--parts samples Baton with its workers in its process (perf, two samples a millisecond) and says which part of
the process's CPU is the coordinator's, which the workers', and which neither's: the runtime's looking for events. That
needs a build whose stacks can be walked and whose symbols name their types:
    RUSTFLAGS="-C force-frame-pointers=yes -C symbol-mangling-version=v0" cargo build --release
"""

import argparse
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

SPLIT = ["vllm-pd", "smg-pd", "sgl-pd"]
AGGREGATED = ["vllm", "smg", "sgl"]
ENGINES = {"prefill": [8101, 8102], "decode": [8201, 8202]}
HTTP_PORT = 9100
# Where Baton's workers are: on this core, or in the coordinator's process.
WORKERS = {
    "baton, workers on the engines' core": 0,
    "baton, workers on its core": 1,
    "baton, workers in its process": None,
}

# Two tokens and not one: with one, Baton runs a single leg, and the others both.
SCENARIOS = {
    "two-token requests, c16": {
        "args": ["-c", "16", "--max-tokens", "2", "--uniq"],
        "show": ["rps", "cpu_us_req", "workers_us_req", "lat_p50"],
        "cost": "cpu_us_req",
    },
    "128-token streams, c16": {
        "args": ["-c", "16", "--stream", "--max-tokens", "128", "--uniq"],
        "show": ["tok_s", "cpu_s_Mtok", "workers_s_Mtok", "ttft_p50", "ttft_p99"],
        "cost": "cpu_s_Mtok",
    },
    "32-token streams at 5 ms ITL, c16": {
        "args": ["-c", "16", "--stream", "--max-tokens", "32", "--uniq"],
        "itl_us": 5000,
        "show": ["rps", "ttft_p50", "ttft_p99", "cpu_us_req", "workers_us_req"],
        "cost": "cpu_us_req",
    },
    "256 KiB prompt, c1": {
        "args": ["-c", "1", "--max-tokens", "2", "--prompt-bytes", "262144", "--uniq"],
        "show": ["lat_p50", "lat_p99", "cpu_us_req"],
        "cost": "cpu_us_req",
    },
    "1,000 streams at 100 ms ITL, aggregated": {
        "args": ["-c", "1000", "--stream", "--max-tokens", "200", "--uniq", "--ramp-ms", "4000"],
        "seconds": 10,
        "aggregated": True,
        "itl_us": 100_000,
        "show": ["tok_s", "cpu_s_Mtok", "kb_stream", "workers_s_Mtok", "workers_kb_stream"],
        "cost": "cpu_s_Mtok",
    },
}


def cpu_seconds(pids):
    total = 0.0
    for pid in pids:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def memory_kb(pids, line):
    """What /proc says under VmRSS (now) or VmHWM (at most so far)."""
    statuses = (pathlib.Path(f"/proc/{pid}/status").read_text() for pid in pids)
    return sum(int(re.search(rf"^{line}:\s+(\d+) kB", status, re.MULTILINE)[1]) for status in statuses)


# Whose a sample is: the crates whose names stand in its stack, nearest to where it was taken first.
OWNERS = {
    "baton_worker": "workers",
    "baton_engine": "workers",
    "baton_coordinator": "coordinator",
    "baton_core": "coordinator",
}
PARTS = ["coordinator", "workers", "runtime"]


def sample(pid, seconds, into):
    """Starts to sample a process, from core 0."""
    command = ["taskset", "-c", "0", "perf", "record", "-q", "-F", "1999", "-g", "-p", str(pid), "-o", into]
    return subprocess.Popen([*command, "--", "sleep", str(seconds)], stderr=subprocess.DEVNULL)


def parts(samples):
    """The part of the samples that is the coordinator's, the workers', and the runtime's own."""
    command = ["perf", "script", "-i", samples, "-F", "ip,sym", "--no-inline"]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    owners = [
        next((OWNERS[crate] for crate in re.findall("|".join(OWNERS), stack)), "runtime")
        for stack in text.split("\n\n")
        if stack.strip()
    ]
    if not owners or set(owners) == {"runtime"}:
        sys.exit("no sample names a crate of ours: see --help for how to build for --parts")
    return {owner: owners.count(owner) / len(owners) for owner in PARTS}


def wait_for(url, seconds=30):
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=1) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        if time.monotonic() > deadline:
            sys.exit(f"{url} never answered 200")
        time.sleep(0.05)


class Baton:
    """Coordinator on core 1, four workers over the fake engines."""

    def __init__(self, binary, workers_core, aggregated):
        self.directory = tempfile.TemporaryDirectory(prefix="baton-bench-")
        path = pathlib.Path(self.directory.name)
        config = path / "baton.toml"
        lines = [f'[coordinator]\nlisten = "127.0.0.1:{HTTP_PORT}"\nworkers_listen = "127.0.0.1:9101"\n']
        workers = []
        for role, ports in ENGINES.items():
            for index, port in enumerate(ports):
                if aggregated and role == "prefill":
                    continue
                workers.append((f"{role}-{index}", role))
                lines.append(
                    f'[[worker]]\nname = "{role}-{index}"\nrole = "{role}"\n'
                    f'[worker.engine]\nkind = "vllm"\nurl = "http://127.0.0.1:{port}"\n'
                    "engine_handoff = true\n"
                )
        config.write_text("\n".join(lines))
        self.log = open(path / "log", "w")
        env = {**os.environ, "BATON_LOG": "warn"}

        def start(core, *arguments):
            command = ["taskset", "-c", str(core), binary, *arguments, "--config", str(config)]
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=self.log, stderr=self.log, env=env
            )

        if workers_core is None:
            self.coordinator = start(1, "coordinator", "--with-workers")
            self.workers = []
        else:
            self.coordinator = start(1, "coordinator")
            self.workers = [
                start(workers_core, f"{role}-worker", "--name", name) for name, role in workers
            ]
        if aggregated:
            wait_for(f"http://127.0.0.1:{HTTP_PORT}/health")
            time.sleep(1.5)
        else:
            wait_for(f"http://127.0.0.1:{HTTP_PORT}/ready")

    def stop(self):
        for process in [*self.workers, self.coordinator]:
            process.send_signal(signal.SIGTERM)
        for process in [*self.workers, self.coordinator]:
            process.wait(timeout=30)


def measure(options, name, scenario):
    """One measurement of one router, started and stopped for it."""
    run = [str(options.peers / "run.sh")]
    seconds = str(scenario.get("seconds", options.seconds))
    arguments = [*scenario["args"], "--secs", seconds]
    baton = None
    if name in WORKERS:
        baton = Baton(str(options.baton), WORKERS[name], scenario.get("aggregated", False))
        worker_pids = [process.pid for process in baton.workers]
        before, before_kb = cpu_seconds(worker_pids), memory_kb(worker_pids, "VmRSS")
        command = [
            "taskset", "-c", "0", str(options.dir / "target/release/loadgen"),
            "--addr", f"127.0.0.1:{HTTP_PORT}", "--name", name, "--pid", str(baton.coordinator.pid),
            *arguments,
        ]
    else:
        subprocess.run([*run, "start", str(options.dir), name], check=True)
        time.sleep(4)
        command = [*run, "load", str(options.dir), name, *arguments]
    streams = int(scenario["args"][scenario["args"].index("-c") + 1])
    load = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    samples = None
    if options.parts and baton and not baton.workers:
        # Of the middle of it.
        time.sleep(float(seconds) * 0.5)
        samples = str(pathlib.Path(baton.directory.name) / "perf.data")
        sample(baton.coordinator.pid, float(seconds) * 0.4, samples).wait()
    output = load.communicate()[0]
    if load.returncode != 0:
        sys.exit(f"{command} ended with {load.returncode}")
    result = json.loads(output.strip().splitlines()[-1].replace(":-0.0", ":0"))
    if baton:
        spent = cpu_seconds(worker_pids) - before
        # The load's warm-up is in the workers' figure and not in its counts: an upper bound.
        requests = result["rps"] * float(seconds)
        tokens = result["tok_s"] * float(seconds)
        result["workers_us_req"] = spent * 1e6 / max(requests, 1)
        result["workers_s_Mtok"] = spent * 1e6 / tokens if tokens else None
        result["workers_kb_stream"] = (memory_kb(worker_pids, "VmHWM") - before_kb) / streams
        if samples:
            for owner, part in parts(samples).items():
                result[f"{owner}_part"] = part * result[scenario["cost"]]
        baton.stop()
    else:
        subprocess.run([*run, "stop", str(options.dir), name], check=True)
        time.sleep(1)
    result["kb_stream"] = (result["rss"] - result["rss0"]) * 1024 / streams
    if result["errs"]:
        print(f"  {name}: {result['errs']} errors: {result['err']}", file=sys.stderr)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("peers", type=pathlib.Path)
    parser.add_argument("dir", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--baton", type=pathlib.Path, default=pathlib.Path("target/release/baton"))
    parser.add_argument("--only", help="scenarios whose name contains this")
    parser.add_argument("--router", default="", help="routers whose name contains this")
    parser.add_argument("--parts", action="store_true", help="whose the CPU of Baton in one process is")
    parser.add_argument("--json", type=pathlib.Path, help="write every measurement there")
    options = parser.parse_args()
    options.baton = options.baton.resolve()

    subprocess.run([str(options.peers / "run.sh"), "engines", str(options.dir)], check=True)
    time.sleep(1)
    everything = {}
    try:
        for title, scenario in SCENARIOS.items():
            if options.only and options.only not in title:
                continue
            itl = scenario.get("itl_us", 0)
            urllib.request.urlopen(f"http://127.0.0.1:8101/__ctl?port=0&itl_us={itl}").read()
            peers = AGGREGATED if scenario.get("aggregated") else SPLIT
            names = [*peers, *WORKERS]
            names = [name for name in names if options.router in name]
            results = {name: [] for name in names}
            for round_number in range(options.rounds):
                for name in names:
                    print(f"{title}: round {round_number + 1}, {name}", file=sys.stderr)
                    results[name].append(measure(options, name, scenario))
            everything[title] = results
            print(f"\n### {title}\n")
            shown = scenario["show"] + ([f"{owner}_part" for owner in PARTS] if options.parts else [])
            print("| router | " + " | ".join(shown) + " |")
            print("|---|" + "---|" * len(shown))
            for name, runs in results.items():
                cells = []
                for column in shown:
                    values = [run[column] for run in runs if run.get(column) is not None]
                    cells.append(f"{statistics.median(values):.1f}" if values else "")
                print(f"| {name} | " + " | ".join(cells) + " |")
            sys.stdout.flush()
    finally:
        pid = int((options.dir / "engines.pid").read_text())
        os.kill(pid, signal.SIGTERM)
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
