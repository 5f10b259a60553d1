"""What this connector can serve, and what two engines must share to understand each other's KV."""

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import FullAttentionSpec

from .layout import PagedCache
from .version import __version__

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


class Unsupported(Exception):
    """vLLM is configured in a way in which a handoff could go wrong. It must not start so."""


def require_supported(config: "VllmConfig", kv_cache: "KVCacheConfig") -> None:
    """Raises :class:`Unsupported` with what to change."""
    parallel = config.parallel_config
    transfer = config.kv_transfer_config
    assert transfer is not None
    faults = [
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism"),
        (parallel.decode_context_parallel_size > 1, "decode context parallelism"),
        (parallel.prefill_context_parallel_size > 1, "prefill context parallelism"),
        (config.model_config.enable_prompt_embeds, "prompt embeddings (--enable-prompt-embeds)"),
        (config.model_config.is_encoder_decoder, "encoder-decoder models"),
        (
            len(kv_cache.kv_cache_groups) != 1,
            f"models with {len(kv_cache.kv_cache_groups)} KV cache groups",
        ),
        (
            any(not _is_full_attention(group.kv_cache_spec) for group in kv_cache.kv_cache_groups),
            "models with other than full attention (sliding windows, Mamba, hybrids)",
        ),
        (
            transfer.kv_role != "kv_both",
            f'kv_role "{transfer.kv_role}" (a request tells its role: set "kv_both")',
        ),
        (
            transfer.kv_load_failure_policy != "fail",
            'kv_load_failure_policy "recompute" (a lost handoff must not pass unseen: set "fail")',
        ),
    ]
    found = [fault for is_so, fault in faults if is_so]
    if found:
        raise Unsupported("Baton's connector does not support " + "; nor ".join(found))


def _is_full_attention(spec: object) -> bool:
    return (
        isinstance(spec, FullAttentionSpec)
        and spec.sliding_window is None
        and spec.attention_chunk_size is None
    )


def socket_path(config: "VllmConfig") -> str:
    assert config.kv_transfer_config is not None
    socket = config.kv_transfer_config.get_from_extra_config("socket", None)
    if not isinstance(socket, str) or not socket:
        raise Unsupported(
            'kv_connector_extra_config needs "socket", the path of the worker\'s socket'
        )
    return socket


def layer_groups(config: "VllmConfig") -> int:
    """In which a step's blocks leave, one after the other."""
    assert config.kv_transfer_config is not None
    groups = config.kv_transfer_config.get_from_extra_config("layer_groups", 1)
    if type(groups) is not int or groups < 1:
        raise Unsupported(
            f'"layer_groups" in kv_connector_extra_config is {groups!r}: it must be a number from 1 up'
        )
    return groups


def layers_come_once(config: "VllmConfig") -> bool:
    """Whether a layer's KV of a step is complete when vLLM calls ``save_kv_layer`` for it: neither
    half a batch before the other, nor once more for drafted tokens. Else groups leave after the
    step."""
    return config.speculative_config is None and not config.parallel_config.use_ubatching


def describe(config: "VllmConfig", cache: PagedCache, rank: int) -> dict[str, Any]:
    cache_dtype = config.cache_config.cache_dtype
    return {
        "model": _model_name(config.model_config.model),
        "revision": config.model_config.revision or _config_digest(config.model_config.hf_config),
        "kv_dtype": cache.dtype if cache_dtype == "auto" else cache_dtype,
        "kv_layout": cache.description,
        "block_size_tokens": config.cache_config.block_size,
        "layer_groups": cache.layer_groups,
        "block_bytes": cache.block_bytes,
        "tensor_parallel_rank": rank,
        "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
        "kv_heads": cache.heads(config.model_config.get_total_num_kv_heads()),
        "connector_version": __version__,
    }


def _model_name(model: str) -> str:
    """A name on the hub as it is, a path without the machine's own directories."""
    return os.path.basename(os.path.abspath(model)) if os.path.isdir(model) else model


def _config_digest(hf_config: Any) -> str:
    """Of the model's configuration, without what differs by machine and library."""
    fields = {
        name: value
        for name, value in hf_config.to_dict().items()
        if name not in ("_name_or_path", "transformers_version")
    }
    text = json.dumps(fields, sort_keys=True, default=str, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def attention_backend(config: "VllmConfig", layers: list[str]) -> str:
    """Which backend lays a page out inside. Where vLLM does not tell, nothing."""
    context = config.compilation_config.static_forward_context
    backends = {
        layer.get_attn_backend().get_name()
        for layer in map(context.get, layers)
        if layer is not None and hasattr(layer, "get_attn_backend")
    }
    return "+".join(sorted(backends))
