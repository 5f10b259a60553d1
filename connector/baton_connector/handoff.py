"""What a request's ``kv_transfer_params`` say, and the digest that names its prompt."""

import hashlib
import struct
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from vllm.v1.request import Request

U32_MAX = 2**32 - 1


class Role(Enum):
    PRODUCE = "produce"
    CONSUME = "consume"
    LEND = "lend"
    """Produce, where all of the prompt but its last token is cached; else nothing."""


class HandoffKey(NamedTuple):
    handoff: uuid.UUID
    generation: int

    def wire(self) -> dict[str, Any]:
        return {"handoff": str(self.handoff), "generation": self.generation}

    @classmethod
    def from_wire(cls, message: dict[str, Any]) -> "HandoffKey":
        """Raises ``ValueError`` where ``message`` names no handoff."""
        handoff, generation = message.get("handoff"), message.get("generation")
        if not isinstance(handoff, str):
            raise ValueError("handoff is not a text")
        if type(generation) is not int or not 0 <= generation <= U32_MAX:
            raise ValueError("generation is not a number of 32 bits")
        return cls(uuid.UUID(handoff), generation)


@dataclass(frozen=True, slots=True)
class Part:
    """A request's part in a handoff. Without a key the parameters were malformed."""

    role: Role
    key: HandoffKey | None
    fault: str = ""


def read_part(params: dict[str, Any] | None) -> Part | None:
    """``None`` where the request has no part in any handoff of ours.

    Whatever is not plainly a producer is taken as a malformed consumer: a producer that is ignored
    costs a handoff, a consumer that is ignored would silently compute what it should have received.
    """
    if not params or "baton" not in params:
        return None
    baton = params["baton"]
    if not isinstance(baton, dict):
        return Part(Role.CONSUME, None, "baton is not an object")
    role = next((role for role in Role if role.value == baton.get("role")), None)
    if role is None:
        return Part(Role.CONSUME, None, "role is neither produce, consume nor lend")
    try:
        return Part(role, HandoffKey.from_wire(baton))
    except ValueError as error:
        return Part(role, None, str(error))


def prompt_digest(request: "Request") -> str:
    """SHA-256 over the token ids as little-endian ``u32``, then over whatever else the prompt's KV
    depends on: adapter, media, cache salt, each with a letter for its kind and its length. Hex."""
    tokens = request.prompt_token_ids or []
    digest = hashlib.sha256(struct.pack(f"<{len(tokens)}I", *tokens))

    def add(kind: bytes, text: str) -> None:
        encoded = text.encode()
        digest.update(kind + struct.pack("<I", len(encoded)) + encoded)

    if request.lora_request is not None:
        add(b"l", request.lora_request.lora_name)
    for feature in request.mm_features:
        add(b"m", feature.mm_hash or feature.identifier)
    if request.cache_salt is not None:
        add(b"s", request.cache_salt)
    return digest.hexdigest()


class RecentHandoffs:
    """The last handoffs of some kind: enough for whatever still arrives late, without growing."""

    def __init__(self, capacity: int = 4096) -> None:
        self._capacity = capacity
        self._keys: OrderedDict[HandoffKey, None] = OrderedDict()

    def add(self, key: HandoffKey) -> None:
        self._keys[key] = None
        if len(self._keys) > self._capacity:
            self._keys.popitem(last=False)

    def __contains__(self, key: HandoffKey) -> bool:
        return key in self._keys
