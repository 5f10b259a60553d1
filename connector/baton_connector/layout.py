"""The paged KV cache as bytes: where a block's pages lie, and copies of whole blocks.

A block travels as the pages of all layers, one after another, each in the order in which it lies in
memory. What a page holds inside is the attention backend's affair (on CPU, for one, all K rows of a
head come before its V rows), so pages are only ever copied whole. Where a layer's view is vLLM's own
``[blocks, heads, tokens, content]``, :meth:`PagedCache.heads` says where each head lies, and the
workers can make blocks of one another's for engines that split the heads over other numbers of
ranks; else blocks pass between engines alone whose ``description`` is the same.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby

import torch


class LayoutError(Exception):
    """The cache is laid out in a way that this connector cannot copy."""


class PagedCache:
    def __init__(self, layers: dict[str, torch.Tensor], num_blocks: int, backend: str = "") -> None:
        """``layers``: each layer's view, blocks first. Layers that share memory count once."""
        if not layers:
            raise LayoutError("the engine has no KV cache")
        distinct = {(t.device, t.data_ptr()): t for t in layers.values()}
        self._pages = [_pages(tensor, num_blocks) for tensor in distinct.values()]
        self.device = self._pages[0].device
        self.dtype = str(next(iter(layers.values())).dtype).removeprefix("torch.")
        self.block_bytes = sum(pages.shape[1] for pages in self._pages)
        self.description = _describe(list(distinct.values()), backend)
        self._layers, self._backend = list(distinct.values()), backend

    def heads(self, total: int) -> str:
        """Where each of the heads lies in a block, of so many on all ranks together, in the workers'
        words (``baton_types::HeadLayout``); nothing where it cannot be told."""
        pages = [_heads(layer) for layer in self._layers]
        if not self._backend or "/" in self._backend or not all(pages):
            return ""
        return f"{self._backend}/{total}/" + "+".join(f"{n}*{page}" for n, page in _runs(pages))

    def copy_out(self, block_id: int, slot: torch.Tensor) -> None:
        start = 0
        for pages in self._pages:
            end = start + pages.shape[1]
            slot[start:end].copy_(pages[block_id], non_blocking=True)
            start = end

    def copy_in(self, slot: torch.Tensor, block_id: int) -> None:
        start = 0
        for pages in self._pages:
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


Ticket = Callable[[], bool]
"""Answers whether the copies made before it have ended."""


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

    def ticket(self) -> Ticket:
        if self._stream is None:
            return lambda: True
        event = torch.cuda.Event()
        event.record(self._stream)
        return event.query

    def fence(self) -> None:
        """What the model is given from now on waits for the copies made so far."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def drain(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
