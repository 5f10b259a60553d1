#!/usr/bin/env python3
"""Does a prompt's KV leave while the prompt is still computed?

Runs a cluster with the embedded engine in two network namespaces. What leaves that of the prefill worker is held
to a rate at which the KV of one prompt takes as long to pass as the prompt takes to compute, and the time to the
first token is compared with the longer of the two. One after the other they would take twice as long. Needs
root, `ip` and `tc`.

    cargo build --release -p baton
    scripts/bench_pipelining.py target/release/baton
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time

HTTP_PORT, WORKERS_PORT, TRANSFER_PORT = 18800, 18801, 18802
BLOCK_TOKENS = 16

CONFIG = """
insecure_plaintext = true

[placement]
mode = "always"

[coordinator]
listen = "127.0.0.1:{http}"
workers_listen = "10.77.0.2:{workers}"

[arena]
directory = "."
export_bytes = "{arena} MiB"
import_bytes = "{arena} MiB"

[transfer]
transport = "quic"

[engine]
kind = "sim"
time_scale = {time_scale}
profile = "{profile}"
max_model_tokens = {model_tokens}
max_step_tokens = {step_tokens}
kv_blocks = {kv_blocks}
block_size_tokens = {block_tokens}
kv_bytes_per_token = {bytes_per_token}

[[worker]]
name = "prefill-0"
role = "prefill"
[worker.transfer]
listen = "10.77.0.1:{transfer}"

[[worker]]
name = "decode-0"
role = "decode"
[worker.transfer]
listen = "10.77.0.2:{transfer}"
"""


def run(*command):
    subprocess.run(command, check=True)


class Network:
    """Two namespaces and a wire between them."""

    def __init__(self):
        self.prefill, self.decode = (f"baton-{side}-{os.getpid()}" for side in "pd")
        for name in (self.prefill, self.decode):
            run("ip", "netns", "add", name)
            run(*inside(name), "ip", "link", "set", "lo", "up")
        run(*inside(self.prefill), "ip", "link", "add", "wire", "type", "veth", "peer", "name", "eriw")
        run(*inside(self.prefill), "ip", "link", "set", "eriw", "netns", self.decode)
        for name, device, address in (
            (self.prefill, "wire", "10.77.0.1/24"), (self.decode, "eriw", "10.77.0.2/24"),
        ):
            run(*inside(name), "ip", "address", "add", address, "dev", device)
            run(*inside(name), "ip", "link", "set", device, "mtu", "9000", "up")

    def limit(self, bytes_per_s):
        # What waits is what a switch would hold of it: 8 ms.
        queue = max(int(bytes_per_s * 0.008), 256 << 10)
        run(
            *inside(self.prefill), "tc", "qdisc", "replace", "dev", "wire", "root", "tbf",
            "rate", f"{int(bytes_per_s * 8)}bit", "burst", "128kb", "limit", str(queue),
        )

    def of(self, process):
        return self.prefill if process.startswith("prefill") else self.decode

    def remove(self):
        for name in (self.prefill, self.decode):
            subprocess.run(("ip", "netns", "delete", name), check=False)


def inside(namespace):
    return ("ip", "netns", "exec", namespace)


class Cluster:
    def __init__(self, baton, network, directory):
        self.baton, self.network, self.directory = baton, network, directory
        self.processes = {}

    def start(self, *names):
        for name in names:
            role = f"{name.split('-')[0]}-worker" if "-" in name else name
            command = [*inside(self.network.of(name)), self.baton, role]
            command += ["--config", os.path.join(self.directory, "baton.toml")]
            command += ["--name", name] if "-" in name else []
            log = open(os.path.join(self.directory, f"{name}.log"), "ab")
            self.processes[name] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log
            )

    def stop(self, *names):
        for name in names or list(self.processes):
            process = self.processes.pop(name)
            process.terminate()
            process.wait()


CLIENT = r"""
import http.client, json, sys, time
port, body = int(sys.argv[1]), sys.stdin.read()
connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
begun = time.monotonic()
connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
answer = connection.getresponse()
first = None
while True:
    line = answer.readline()
    if not line:
        break
    if line.startswith(b"data: {") and first is None:
        first = time.monotonic() - begun
print(json.dumps({
    "status": answer.status, "ttft_s": first, "path": answer.getheader("x-baton-path"),
    "reason": answer.getheader("x-baton-reason"),
}))
"""


def ask(network, tokens):
    prompt = [random.randrange(256, 4000) for _ in range(tokens)]
    body = json.dumps({"model": "baton-sim", "prompt": prompt, "max_tokens": 2, "stream": True})
    done = subprocess.run(
        (*inside(network.decode), sys.executable, "-c", CLIENT, str(HTTP_PORT)),
        input=body, capture_output=True, text=True, check=False,
    )
    return json.loads(done.stdout) if done.returncode == 0 else {"status": 0, "path": None}


def ask_until(network, path, tokens):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        answer = ask(network, tokens)
        if answer["status"] == 200 and answer["path"] == path:
            return answer
        time.sleep(0.5)
    raise SystemExit(f"no answer was {path} within a minute: {answer}")


def median_ttft(network, path, arguments):
    ask_until(network, path, 64)
    answers = [ask_until(network, path, arguments.tokens) for _ in range(arguments.rounds)]
    return statistics.median(answer["ttft_s"] for answer in answers)


def write_config(directory, time_scale, arguments, prompt_bytes):
    toml = CONFIG.format(
        http=HTTP_PORT, workers=WORKERS_PORT, transfer=TRANSFER_PORT, time_scale=time_scale,
        profile=os.path.abspath(arguments.profile), arena=max(2 * prompt_bytes >> 20, 16),
        model_tokens=2 * arguments.tokens, step_tokens=arguments.step_tokens,
        kv_blocks=8 * arguments.tokens // BLOCK_TOKENS, block_tokens=BLOCK_TOKENS,
        bytes_per_token=arguments.bytes_per_token,
    )
    with open(os.path.join(directory, "baton.toml"), "w", encoding="utf-8") as file:
        file.write(toml)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("baton")
    parser.add_argument("--profile", default="engine/profiles/h100_llama31_70b_fp8_tp4.json")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--step-tokens", type=int, default=512)
    # A real 70B model has 320 KiB: the ratio of the two times counts, not the bytes, as long as the machine has
    # the time to move them.
    parser.add_argument("--bytes-per-token", type=int, default=1024)
    # No transport fills a link: so much faster it is than what the two times are to be equal.
    parser.add_argument("--rate-factor", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    prompt_bytes = arguments.tokens * arguments.bytes_per_token
    network = Network()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        write = lambda time_scale: write_config(directory, time_scale, arguments, prompt_bytes)
        write(1.0)
        cluster = Cluster(os.path.abspath(arguments.baton), network, directory)
        try:
            cluster.start("coordinator", "decode-0")
            prefill_s = median_ttft(network, "aggregated", arguments)
            cluster.start("prefill-0")
            unlimited_s = median_ttft(network, "disaggregated", arguments)
            rate = arguments.rate_factor * prompt_bytes / prefill_s
            network.limit(rate)
            limited_s = median_ttft(network, "disaggregated", arguments)
            # An engine that takes no time leaves what the link takes.
            cluster.stop("prefill-0", "decode-0")
            write(0.0)
            cluster.start("prefill-0", "decode-0")
            transfer_s = median_ttft(network, "disaggregated", arguments)
        finally:
            cluster.stop()
            network.remove()
    print(json.dumps({
        "prompt_tokens": arguments.tokens,
        "step_tokens": arguments.step_tokens,
        "prompt_kv_mib": prompt_bytes / (1 << 20),
        "link_mbit_per_s": rate * 8e-6,
        "prefill_ms": 1e3 * prefill_s,
        "transfer_ms": 1e3 * transfer_s,
        "ttft_ms_fast_link": 1e3 * unlimited_s,
        "ttft_ms_slow_link": 1e3 * limited_s,
        "ratio_to_the_longer": limited_s / max(prefill_s, transfer_s),
        "ratio_to_the_sum": limited_s / (prefill_s + transfer_s),
    }, indent=2))


if __name__ == "__main__":
    main()
