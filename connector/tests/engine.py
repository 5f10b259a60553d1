"""A real ``vllm serve`` with the connector, for tests."""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

VLLM, MODEL = os.environ.get("BATON_VLLM"), os.environ.get("BATON_MODEL")
needs_vllm = pytest.mark.skipif(
    not (VLLM and MODEL), reason="BATON_VLLM and BATON_MODEL are not set: no real vLLM to test with"
)

LAYER_GROUPS = 2
"""In which its blocks are handed over."""
START_SECONDS = 300.0
ANSWER_SECONDS = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Engine:
    def __init__(self, vllm: str, model: str, agent_socket: str, log: Path) -> None:
        self.port = free_port()
        self.log = log
        transfer = {
            "kv_connector": "BatonConnector",
            "kv_connector_module_path": "baton_connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "fail",
            "kv_connector_extra_config": {
                "socket": agent_socket,
                "layer_groups": LAYER_GROUPS,
            },
        }
        command = [
            *(f"{vllm}/bin/vllm", "serve", model, "--served-model-name", "model"),
            *("--host", "127.0.0.1", "--port", str(self.port), "--enforce-eager"),
            *("--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "8"),
            *("--block-size", "32", "--kv-cache-memory-bytes", str(256 << 20)),
            *("--max-num-batched-tokens", "512", "--enable-prompt-tokens-details"),
            *("--kv-transfer-config", json.dumps(transfer)),
            *("--scheduler-cls", "baton_connector.scheduler.PacedScheduler"),
            *("--scheduling-policy", "priority"),
        ]
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parent.parent),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "0",
        }
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT
            )

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                self._call("/health", None)
                return
            except OSError:
                time.sleep(0.25)
        tail = self.log.read_text(errors="replace")[-6000:]
        raise AssertionError(f"vLLM did not start:\n{tail}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def complete(self, prompt: list[int], **fields: Any) -> dict[str, Any]:
        """Greedy, with token ids. Raises ``urllib.error.HTTPError``."""
        body = {
            "model": "model",
            "prompt": prompt,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            **fields,
        }
        return json.loads(self._call("/v1/completions", body))

    def reset_prefix_cache(self) -> None:
        self._call("/reset_prefix_cache", {})

    def metric(self, name: str) -> float:
        """The sum over all labels; 0 where the metric is not there yet."""
        lines = self._call("/metrics", None).decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if _is(line, name))

    def _call(self, path: str, body: dict[str, Any] | None) -> bytes:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            return answer.read()


def _is(line: str, name: str) -> bool:
    return line.startswith((f"{name}{{", f"{name} "))


def status_of(error: BaseException) -> int:
    assert isinstance(error, urllib.error.HTTPError), error
    return error.code
