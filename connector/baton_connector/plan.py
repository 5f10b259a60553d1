"""What the two halves of the connector tell each other at each engine step.

The scheduler's half lives in the EngineCore process, the other in each worker process. vLLM carries
one :class:`StepPlan` down with every step, and one :class:`WorkerReport` up with its output. With
asynchronous scheduling a plan is made before the report of the step before it has come.
"""

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from .handoff import HandoffKey


@dataclass(slots=True)
class Seal:
    prompt_tokens: int
    prompt_digest: str
    cached_tokens: int


@dataclass(slots=True)
class Export:
    """Blocks of a prompt that are complete once this step's forward has run."""

    req_id: str
    key: HandoffKey
    blocks: list[tuple[int, int]]
    """Each as (index in the prompt, block id)."""
    seal: Seal | None
    """With the last of them."""
    last_chance: bool
    """The scheduler counts on free slots for them, and holds the request's blocks no longer than
    to the end of this step."""


@dataclass(slots=True)
class ExportEnd:
    req_id: str
    key: HandoffKey
    aborted: bool
    held: bool
    """Its blocks stay until the worker's half reports the request as sent."""


@dataclass(slots=True)
class Subscribe:
    req_id: str
    key: HandoffKey | None
    """``None``: there is nothing that could be loaded; fail the request."""
    first_block: int
    block_ids: list[int]
    """Of the blocks from ``first_block`` on."""
    prompt_tokens: int
    prompt_digest: str


@dataclass(slots=True)
class StepPlan(KVConnectorMetadata):
    seq: int = 0
    """Counts the plans of one scheduler, from 1."""
    withdrawn: list[str] = field(default_factory=list)
    """Preempted producers: their blocks are lost where they are not exported yet."""
    export_ends: list[ExportEnd] = field(default_factory=list)
    load_ends: list[str] = field(default_factory=list)
    notices: list[tuple[str, HandoffKey]] = field(default_factory=list)
    """Messages to pass on as they are."""
    subscribes: list[Subscribe] = field(default_factory=list)
    exports: list[Export] = field(default_factory=list)


@dataclass(slots=True)
class WorkerReport(KVConnectorWorkerMetadata):
    seq: int
    """Of the last plan that was carried out in full."""
    free_slots: int
    """Export slots that any producer could have after it."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "WorkerReport":
        assert isinstance(other, WorkerReport)
        return WorkerReport(min(self.seq, other.seq), min(self.free_slots, other.free_slots))
