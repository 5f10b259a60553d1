#!/usr/bin/env python3
"""Does a prompt's KV leave while the prompt is still computed?

Runs a cluster with the embedded engine, or with vLLM, in two network namespaces. What leaves that of the prefill
worker is held to a rate at which the KV of one prompt takes as long to pass as the prompt takes to compute, and the
time to the first token is compared with the longer of the two. One after the other they would take twice as long.
Needs root, `ip` and `tc`.

    cargo build --release -p baton
    scripts/bench_pipelining.py target/release/baton
    scripts/bench_pipelining.py target/release/baton --vllm VENV --model DIR --tokens 1500
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

HTTP_PORT, WORKERS_PORT, TRANSFER_PORT, ENGINE_PORT = 18800, 18801, 18802, 18803
BLOCK_TOKENS = 16
MODEL = "baton-sim"
# A vLLM that waits for KV turns without rest (its processes look for each other's messages), and would take the time of
# one that computes. So the engine whose prefill counts has a core of its own, as on any machine with more than two, and
# all else has the other. An embedded engine is in its worker's process, and each worker has a core.
PREFILL_CORE, OTHER_CORE = "0", "1"

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
{engine}
layer_groups = {layer_groups}

[[worker]]
name = "prefill-0"
role = "prefill"
[worker.engine]
{prefill_engine}
[worker.transfer]
listen = "10.77.0.1:{transfer}"

[[worker]]
name = "decode-0"
role = "decode"
[worker.engine]
{decode_engine}
[worker.transfer]
listen = "10.77.0.2:{transfer}"
"""

SIM = """
kind = "sim"
time_scale = {time_scale}
profile = "{profile}"
max_model_tokens = {model_tokens}
max_step_tokens = {step_tokens}
kv_blocks = {kv_blocks}
block_size_tokens = {block_tokens}
kv_bytes_per_token = {bytes_per_token}
"""

VLLM = """
kind = "vllm"
start_timeout_seconds = 300
"""

VLLM_WORKER = """
command = {command}
port = {port}
connector_socket = "{name}.sock"
environment = {{ HF_HUB_OFFLINE = "1", VLLM_NO_USAGE_STATS = "1", VLLM_SERVER_DEV_MODE = "1", \
VLLM_CPU_OMP_THREADS_BIND = "{core}" }}
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


def on_core(core):
    return ["taskset", "--cpu-list", core]


class Cluster:
    def __init__(self, baton, network, directory, engines_apart):
        self.baton, self.network, self.directory = baton, network, directory
        self.engines_apart = engines_apart
        self.processes = {}

    def start(self, *names):
        for name in names:
            role = f"{name.split('-')[0]}-worker" if "-" in name else name
            embeds = name.startswith("prefill") and not self.engines_apart
            core = on_core(PREFILL_CORE if embeds else OTHER_CORE)
            command = [*inside(self.network.of(name)), *core, self.baton, role]
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


def some_prompt(tokens):
    return [random.randrange(256, 4000) for _ in range(tokens)]


def ask(namespace, prompt, port=HTTP_PORT):
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 2, "stream": True, "ignore_eos": True}
    body = json.dumps(body)
    done = subprocess.run(
        (*inside(namespace), *on_core(OTHER_CORE), sys.executable, "-c", CLIENT, str(port)),
        input=body, capture_output=True, text=True, check=False,
    )
    return json.loads(done.stdout) if done.returncode == 0 else {"status": 0, "path": None}


def ask_until(path, prompt, asking, patience_s=60):
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        answer = asking(prompt)
        if answer["status"] == 200 and answer["path"] == path:
            return answer
        time.sleep(0.5)
    raise SystemExit(f"no answer was {path} within {patience_s} s: {answer}")


def median_ttft(path, asking, arguments):
    ask_until(path, some_prompt(64), asking, patience_s=400)
    # A fresh prompt each time.
    answers = [
        ask_until(path, some_prompt(arguments.tokens), asking) for _ in range(arguments.rounds)
    ]
    return statistics.median(answer["ttft_s"] for answer in answers)


def median_transfer_of_cached(network, asking, arguments):
    """Of prompts that the prefill worker has cached, and the decode worker has not any more."""
    times = []
    for _ in range(arguments.rounds):
        prompt = some_prompt(arguments.tokens)
        ask_until("disaggregated", prompt, asking)
        url = f"http://127.0.0.1:{ENGINE_PORT}/reset_prefix_cache"
        run(*inside(network.decode), sys.executable, "-c", RESET, url)
        times.append(ask_until("disaggregated", prompt, asking)["ttft_s"])
    return statistics.median(times)


RESET = r"""
import sys, urllib.request
urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="POST"), timeout=30).read()
"""


def sim(time_scale, arguments):
    return SIM.format(
        time_scale=time_scale, profile=os.path.abspath(arguments.profile),
        model_tokens=2 * arguments.tokens, step_tokens=arguments.step_tokens,
        kv_blocks=8 * arguments.tokens // BLOCK_TOKENS, block_tokens=BLOCK_TOKENS,
        bytes_per_token=arguments.bytes_per_token,
    )


def vllm(name, core, arguments):
    command = [
        *on_core(core),
        os.path.join(os.path.abspath(arguments.vllm), "bin/vllm"), "serve",
        os.path.abspath(arguments.model), "--served-model-name", MODEL, "--enforce-eager", "--dtype", "float32",
        "--max-model-len", "2048", "--max-num-seqs", "8", "--block-size", "32",
        "--kv-cache-memory-bytes", str(256 << 20),
        "--max-num-batched-tokens", str(arguments.step_tokens),
    ]
    return VLLM_WORKER.format(
        command=json.dumps(command), port=ENGINE_PORT, name=name, core=core
    )


def kv_bytes_per_token(model):
    with open(os.path.join(model, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    # Keys and values, in float32.
    return config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * width * 2 * 4


def write_config(directory, time_scale, arguments, prompt_bytes):
    own = lambda name, core: vllm(name, core, arguments) if arguments.vllm else ""
    toml = CONFIG.format(
        http=HTTP_PORT, workers=WORKERS_PORT, transfer=TRANSFER_PORT,
        engine=VLLM if arguments.vllm else sim(time_scale, arguments),
        prefill_engine=own("prefill-0", PREFILL_CORE), decode_engine=own("decode-0", OTHER_CORE),
        layer_groups=arguments.layer_groups, arena=max(2 * prompt_bytes >> 20, 16),
    )
    with open(os.path.join(directory, "baton.toml"), "w", encoding="utf-8") as file:
        file.write(toml)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("baton")
    parser.add_argument("--profile", default="engine/profiles/h100_llama31_70b_fp8_tp4.json")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--step-tokens", type=int, default=512)
    # In which the blocks of each step leave.
    parser.add_argument("--layer-groups", type=int, default=1)
    # A real 70B model has 320 KiB: the ratio of the two times counts, not the bytes, as long as the machine has
    # the time to move them.
    parser.add_argument("--bytes-per-token", type=int, default=1024)
    # A vLLM instead of the embedded engine: its virtual environment, and a model's directory. The bytes of a token
    # are then those of its KV.
    parser.add_argument("--vllm")
    parser.add_argument("--model")
    # No transport fills a link: so much faster it is than what the two times are to be equal.
    parser.add_argument("--rate-factor", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.vllm:
        arguments.bytes_per_token = kv_bytes_per_token(arguments.model)
    prompt_bytes = arguments.tokens * arguments.bytes_per_token
    network = Network()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        write = lambda time_scale: write_config(directory, time_scale, arguments, prompt_bytes)
        write(1.0)
        apart = arguments.vllm is not None
        cluster = Cluster(os.path.abspath(arguments.baton), network, directory, apart)
        of_cluster = lambda prompt: ask(network.decode, prompt)
        # The engine itself, on its own port.
        of_prefill = lambda prompt: ask(network.prefill, prompt, ENGINE_PORT)
        try:
            cluster.start("coordinator", "decode-0")
            if not apart:
                prefill_s = median_ttft("aggregated", of_cluster, arguments)
            cluster.start("prefill-0")
            unlimited_s = median_ttft("disaggregated", of_cluster, arguments)
            if apart:
                prefill_s = median_ttft(None, of_prefill, arguments)
            rate = arguments.rate_factor * prompt_bytes / prefill_s
            network.limit(rate)
            limited_s = median_ttft("disaggregated", of_cluster, arguments)
            # An engine that takes no time leaves what the link takes; or one that has the prompt cached.
            if arguments.vllm:
                transfer_s = median_transfer_of_cached(network, of_cluster, arguments)
            else:
                cluster.stop("prefill-0", "decode-0")
                write(0.0)
                cluster.start("prefill-0", "decode-0")
                transfer_s = median_ttft("disaggregated", of_cluster, arguments)
        finally:
            cluster.stop()
            network.remove()
    print(json.dumps({
        "prompt_tokens": arguments.tokens,
        "step_tokens": arguments.step_tokens,
        "layer_groups": arguments.layer_groups,
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
