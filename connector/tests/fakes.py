"""As much of vLLM's requests and scheduler output as the connector reads."""

import uuid
from types import SimpleNamespace
from typing import Any

from vllm.v1.request import RequestStatus

from baton_connector.handoff import HandoffKey

KEY = HandoffKey(uuid.UUID(int=1), 0)
OTHER_KEY = HandoffKey(uuid.UUID(int=2), 0)


def request(
    req_id: str = "r",
    *,
    tokens: int = 100,
    role: str | None = "produce",
    key: HandoffKey = KEY,
    **fields: Any,
) -> Any:
    params = {"baton": {"role": role, **key.wire()}} if role else None
    defaults = {
        "request_id": req_id,
        "kv_transfer_params": params,
        "prompt_token_ids": list(range(tokens)),
        "num_prompt_tokens": tokens,
        "num_computed_tokens": 0,
        "num_preemptions": 0,
        "lora_request": None,
        "mm_features": [],
        "cache_salt": None,
        "skip_reading_prefix_cache": False,
        "status": RequestStatus.RUNNING,
    }
    return SimpleNamespace(**{**defaults, **fields})


def step(
    scheduled: dict[str, int] | None = None,
    blocks: dict[str, list[int]] | None = None,
    preempted: tuple[str, ...] = (),
) -> Any:
    return SimpleNamespace(
        num_scheduled_tokens=scheduled or {},
        preempted_req_ids=set(preempted),
        kv_connector_block_state=SimpleNamespace(
            resolve_block_ids=lambda req_id: ((blocks or {})[req_id],)
        ),
    )
