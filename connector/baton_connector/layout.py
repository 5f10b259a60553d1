"""The paged KV cache as bytes: where a block's pages lie, and copies of whole blocks.

A block travels as the pages of all layers, one after another, each in the order in which it lies in
memory; or in layer groups, each of which is a block of its own then: the pages of as many layers. What a page holds inside is the attention backend's affair (on CPU, for one, all K rows of a
head come before its V rows), so pages are only ever copied whole. Where a layer's view is vLLM's own
``[blocks, heads, tokens, content]``, :meth:`PagedCache.heads` says where each head lies, and the
workers can make blocks of one another's for engines that split the heads over other numbers of
ranks; else blocks pass between engines alone whose ``description`` is the same.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby
from typing import Protocol

import torch


class LayoutError(Exception):
    """The cache is laid out in a way that this connector cannot copy."""


class PagedCache:
    def __init__(
        self,
        layers: dict[str, torch.Tensor],
        num_blocks: int,
        backend: str = "",
        layer_groups: int = 1,
    ) -> None:
        """``layers``: each layer's view, blocks first. Layers that share memory count once, by the
        name of the first."""
        if not layers:
            raise LayoutError("the engine has no KV cache")
        distinct: dict[tuple[torch.device, int], str] = {}
        for name, tensor in layers.items():
            distinct.setdefault((tensor.device, tensor.data_ptr()), name)
        names = list(distinct.values())
        if len(names) % layer_groups:
            raise LayoutError(
                f"the KV cache has {len(names)} layers, which {layer_groups} layer groups cannot "
                "share evenly: set layer_groups to a divisor"
            )
        views = [layers[name] for name in names]
        pages = [_pages(view, num_blocks) for view in views]
        in_group = len(names) // layer_groups
        self.layer_groups = layer_groups
        self.group_of = {name: position // in_group for position, name in enumerate(names)}
        """Of each layer."""
        self._groups = [pages[i : i + in_group] for i in range(0, len(pages), in_group)]
        sizes = [sum(page.shape[1] for page in group) for group in self._groups]
        if len(set(sizes)) > 1:
            raise LayoutError(
                f"the layer groups of a block have unlike sizes ({sizes} bytes): set another number "
                "of layer_groups"
            )
        self.block_bytes = sizes[0]
        """Of one layer group."""
        self.device = pages[0].device
        self.dtype = str(views[0].dtype).removeprefix("torch.")
        self.description = _describe(views, backend)
        self._layers, self._backend = views, backend

    def heads(self, total: int) -> str:
        """Where each of the heads lies in a block of one layer group, of so many on all ranks
        together, in the workers' words (``baton_types::HeadLayout``); nothing where it cannot be
        told, or not for all groups alike."""
        pages = [_heads(layer) for layer in self._layers]
        in_group = len(pages) // self.layer_groups
        first = pages[:in_group]
        if not self._backend or "/" in self._backend or not all(pages):
            return ""
        if first * self.layer_groups != pages:
            return ""
        return f"{self._backend}/{total}/" + "+".join(f"{n}*{page}" for n, page in _runs(first))

    def copy_out(self, block_id: int, slot: torch.Tensor, group: int = 0) -> None:
        start = 0
        for pages in self._groups[group]:
            end = start + pages.shape[1]
            slot[start:end].copy_(pages[block_id], non_blocking=True)
            start = end

    def copy_in(self, slot: torch.Tensor, block_id: int, group: int = 0) -> None:
        start = 0
        for pages in self._groups[group]:
            end = start + pages.shape[1]
            pages[block_id].copy_(slot[start:end], non_blocking=True)
            start = end


def _pages(layer: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """The layer as bytes, (blocks, bytes of a page), in memory order and not copied."""
    if layer.shape[0] != num_blocks:
        raise LayoutError(
            f"a layer's KV cache has {layer.shape[0]} pages for {num_blocks} blocks: the attention "
            "backend splits blocks, which this connector does not support"
        )
    expected = 1
    for size, stride in sorted(_inner(layer), key=lambda dimension: dimension[1]):
        if stride != expected:
            raise LayoutError("a block's page is not one piece of memory in each layer")
        expected *= size
    if layer.stride(0) < expected:
        raise LayoutError("the pages of a layer's KV cache overlap")
    flat = layer.as_strided((num_blocks, expected), (layer.stride(0), 1), layer.storage_offset())
    return flat.view(torch.uint8)


def _inner(layer: torch.Tensor) -> list[tuple[int, int]]:
    """(size, stride) of each dimension inside a block that has more than one element."""
    return [(n, s) for n, s in zip(layer.shape[1:], layer.stride()[1:]) if n > 1]


def _heads(layer: torch.Tensor) -> str:
    """The axes of a page down to the head's, and the bytes below it."""
    if layer.dim() != 4:
        return ""
    _, heads, tokens, content = layer.shape
    if layer.stride(1) > layer.stride(2):
        return f"h{heads}.{tokens * content * layer.element_size()}"
    if layer.stride(3) > layer.stride(1):
        return ""
    return f"t{tokens}.h{heads}.{content * layer.element_size()}"


def _describe(layers: list[torch.Tensor], backend: str) -> str:
    def text(layer: torch.Tensor) -> str:
        shape = "x".join(map(str, layer.shape[1:]))
        return f"{shape}@" + ".".join(map(str, layer.stride()[1:]))

    description = "+".join(f"{count}*{text}" for count, text in _runs(map(text, layers)))
    return f"{backend}:{description}" if backend else description


def _runs(texts: Iterable[str]) -> list[tuple[int, str]]:
    """Each with how often it comes in a row."""
    return [(len(list(run)), text) for text, run in groupby(texts)]


class Ticket(Protocol):
    """Stands for the copies made before it."""

    def query(self) -> bool:
        """Whether they have ended."""
        ...

    def synchronize(self) -> None:
        """Waits until they have."""
        ...


class _Done:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class Copier:
    """Orders copies against the model. On a CPU they simply happen when they are made; on a GPU
    they run on a stream of their own, after the work that the model has been given so far, and
    :meth:`fence` keeps the model's next work behind them."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def _on_own_stream(self) -> Iterator[None]:
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def batch(self) -> AbstractContextManager[None]:
        """Within it, copies are made."""
        return nullcontext() if self._stream is None else self._on_own_stream()

    @property
    def is_asynchronous(self) -> bool:
        """Whether copies may go on after they were made."""
        return self._stream is not None

    def ticket(self) -> Ticket:
        if self._stream is None:
            return _Done()
        event = torch.cuda.Event(blocking=True)
        event.record(self._stream)
        return event

    def fence(self) -> None:
        """What the model is given from now on waits for the copies made so far."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def drain(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
