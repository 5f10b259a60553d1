"""The class that vLLM loads. It only passes vLLM's calls on to the half that it is."""

from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from .compatibility import (
    attention_backend,
    describe,
    layer_groups,
    layers_come_once,
    require_supported,
    socket_path,
)
from .layout import PagedCache
from .link import Link
from .plan import StepPlan, WorkerReport
from .scheduler_side import SchedulerSide
from .version import __version__
from .worker_side import WorkerSide

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.baton_connector")


class BatonConnector(KVConnectorBase_V1):
    _cache_hit_source = CacheHitSource.P2P

    def __init__(
        self,
        vllm_config: "VllmConfig",
        role: KVConnectorRole,
        kv_cache_config: "KVCacheConfig",
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        require_supported(vllm_config, kv_cache_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._by_layer = False
        if role is KVConnectorRole.SCHEDULER:
            groups = layer_groups(vllm_config)
            self._scheduler = SchedulerSide(vllm_config.cache_config.block_size, groups)

    # In the worker process.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        config = self._vllm_config
        backend = attention_backend(config, list(kv_caches))
        groups = layer_groups(config)
        cache = PagedCache(kv_caches, self._kv_cache_config.num_blocks, backend, groups)
        self._by_layer = groups > 1 and layers_come_once(config)
        rank = get_tensor_model_parallel_rank()
        hello = {
            "connector_version": __version__,
            "vllm_version": vllm.__version__,
            "compatibility": describe(config, cache, rank),
        }
        path = socket_path(config)
        link = Link(path, hello, cache.block_bytes)
        if self._worker is not None:
            self._worker.stop()  # The engine has made its cache anew.
        logger.info("attaching to the worker at %s: %s", path, hello["compatibility"])
        link.start()
        self._worker = WorkerSide(cache, link)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        assert isinstance(kv_connector_metadata, StepPlan) and self._worker is not None
        self._worker.before_forward(kv_connector_metadata)

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        """Nothing: what has come is loaded before the forward and after it."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: a request runs only when all of its KV is there."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: "AttentionMetadata",
        **kwargs: Any,
    ) -> None:
        """A step that runs as one CUDA graph calls nobody here: then all layer groups leave after it.
        That is why :meth:`requires_piecewise_for_cudagraph` stays what it is, ``False``."""
        if self._by_layer:
            plan = self._get_connector_metadata()
            assert isinstance(plan, StepPlan) and self._worker is not None
            self._worker.layer_computed(plan, layer_name)

    def wait_for_save(self) -> None:
        plan = self._get_connector_metadata()
        assert isinstance(plan, StepPlan) and self._worker is not None
        self._worker.after_forward(plan)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        assert self._worker is not None
        return self._worker.results()

    def build_connector_worker_meta(self) -> WorkerReport:
        assert self._worker is not None
        return self._worker.report()

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.stop()

    # In the scheduler's process.

    def on_new_request(self, request: "Request") -> None:
        assert self._scheduler is not None
        self._scheduler.new_request(request)

    def get_num_new_matched_tokens(
        self, request: "Request", num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        assert self._scheduler is not None
        return self._scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int
    ) -> None:
        assert self._scheduler is not None
        self._scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> StepPlan:
        assert self._scheduler is not None
        return self._scheduler.build_plan(scheduler_output)

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        assert self._scheduler is not None
        self._scheduler.worker_output(connector_output)

    def request_finished(
        self, request: "Request", block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        assert self._scheduler is not None
        return self._scheduler.finished(request), None
