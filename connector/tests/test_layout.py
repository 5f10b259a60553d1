import pytest
import torch

from baton_connector.layout import LayoutError, PagedCache

BLOCKS, HEADS, TOKENS, WIDTH = 4, 3, 5, 7
PAGE = HEADS * TOKENS * WIDTH


def interleaved(layers: int = 2) -> dict[str, torch.Tensor]:
    """As vLLM lays them out on a CPU: all layers in one storage, each contiguous in itself."""
    storage = torch.arange(layers * BLOCKS * PAGE, dtype=torch.float32)
    shape = (BLOCKS, HEADS, TOKENS, WIDTH)
    return {
        f"l{i}": storage[i * BLOCKS * PAGE :][: BLOCKS * PAGE].view(shape) for i in range(layers)
    }


def pages_side_by_side() -> dict[str, torch.Tensor]:
    """Pages of both layers in turn, and inside a page tokens before heads."""
    storage = torch.arange(2 * BLOCKS * PAGE, dtype=torch.bfloat16)
    pages = storage.view(BLOCKS, 2, TOKENS, HEADS, WIDTH)
    return {f"l{i}": pages[:, i].permute(0, 2, 1, 3) for i in range(2)}


@pytest.mark.parametrize("make", [interleaved, pages_side_by_side])
def test_a_block_comes_back_as_it_was_into_another_place(make) -> None:
    layers = make()
    before = {name: layer.clone() for name, layer in layers.items()}
    cache = PagedCache(layers, BLOCKS)
    assert cache.block_bytes == sum(layer[0].nbytes for layer in layers.values())
    slot = torch.zeros(cache.block_bytes + 64, dtype=torch.uint8)
    cache.copy_out(1, slot)
    assert not slot[cache.block_bytes :].any()
    for layer in layers.values():
        layer[1] = 0
    cache.copy_in(slot, 3)
    for name, layer in layers.items():
        assert torch.equal(layer[3], before[name][1])
        assert not layer[1].any()
        assert torch.equal(layer[0], before[name][0]) and torch.equal(layer[2], before[name][2])


def test_layers_that_share_memory_count_once() -> None:
    layers = interleaved()
    cache = PagedCache({**layers, "shared": layers["l0"]}, BLOCKS)
    assert cache.block_bytes == 2 * PAGE * 4


def test_the_description_tells_layouts_apart_and_not_numbers_of_blocks() -> None:
    many = PagedCache(interleaved(), BLOCKS, "B")
    assert many.description == "B:2*3x5x7@35.7.1"
    fewer = {name: layer[:2] for name, layer in interleaved().items()}
    assert PagedCache(fewer, 2, "B").description == many.description
    assert PagedCache(pages_side_by_side(), BLOCKS, "B").description == "B:2*3x5x7@7.21.1"


def test_what_cannot_be_copied_whole_is_refused() -> None:
    whole = interleaved()["l0"]
    halves = torch.zeros(2, BLOCKS, HEADS, TOKENS, WIDTH).permute(1, 0, 2, 3, 4)
    refused = [(whole, 2 * BLOCKS), (halves, BLOCKS), (whole[:, :2], BLOCKS)]
    refused.append((whole[:1].expand(BLOCKS, -1, -1, -1), BLOCKS))
    for layer, blocks in refused[:2] + refused[3:]:
        with pytest.raises(LayoutError):
            PagedCache({"l": layer}, blocks)
    with pytest.raises(LayoutError):
        PagedCache({}, BLOCKS)


def test_where_the_heads_lie_is_told_where_it_is_plain() -> None:
    page = TOKENS * WIDTH
    outside = PagedCache(interleaved(), BLOCKS, "B")
    assert outside.heads(6) == f"B/6/2*h3.{page * 4}"
    inside = PagedCache(pages_side_by_side(), BLOCKS, "B")
    assert inside.heads(3) == f"B/3/2*t5.h3.{WIDTH * 2}"
    # One head lies inside or outside by its stride, as those of other ranks do that have more.
    one = torch.zeros(BLOCKS, TOKENS, 1, WIDTH).permute(0, 2, 1, 3)
    assert PagedCache({"l": one}, BLOCKS, "B").heads(8) == f"B/8/1*t5.h1.{WIDTH * 4}"
    assert PagedCache({"l": one.contiguous()}, BLOCKS, "B").heads(8).startswith("B/8/1*")

    unknown = torch.zeros(BLOCKS, 2, TOKENS, HEADS, WIDTH)
    assert PagedCache({"l": unknown}, BLOCKS, "B").heads(3) == ""
    assert PagedCache(interleaved(), BLOCKS).heads(3) == "", "nobody says what a page is inside"


def cut(told: str, block: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """These heads of a block, found by nothing but what was told of it."""
    parts, start = [], 0
    for run in told.split("/")[2].split("+"):
        layers, page = run.split("*")
        *axes, cell = page.split(".")
        shape = [int(layers), *(int(axis[1:]) for axis in axes), int(cell)]
        end = start + torch.Size(shape).numel()
        heads = 1 + next(i for i, axis in enumerate(axes) if axis.startswith("h"))
        parts.append(block[start:end].view(shape).narrow(heads, first, count).reshape(-1))
        start = end
    assert start == len(block)
    return torch.cat(parts)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)])
def test_the_heads_of_a_rank_lie_where_it_is_told(order) -> None:
    def laid_out(layer: torch.Tensor) -> torch.Tensor:
        return layer.permute(order).contiguous().permute(order)

    whole = [torch.rand(BLOCKS, 4, TOKENS, WIDTH) for _ in range(3)]
    engine = PagedCache({str(i): laid_out(layer) for i, layer in enumerate(whole)}, BLOCKS, "B")
    slot = torch.zeros(engine.block_bytes, dtype=torch.uint8)
    engine.copy_out(2, slot)
    for rank in range(2):
        part = [laid_out(layer[:, 2 * rank : 2 * rank + 2]) for layer in whole]
        cache = PagedCache({str(i): layer for i, layer in enumerate(part)}, BLOCKS, "B")
        own = torch.zeros(cache.block_bytes, dtype=torch.uint8)
        cache.copy_out(2, own)
        assert torch.equal(own, cut(engine.heads(4), slot, 2 * rank, 2))
        assert cache.heads(4) == engine.heads(4).replace("h4", "h2")


@pytest.mark.parametrize("make", [interleaved, pages_side_by_side])
def test_layer_groups_are_parts_of_a_block(make) -> None:
    layers = make()
    whole, halves = PagedCache(layers, BLOCKS, "B"), PagedCache(layers, BLOCKS, "B", 2)
    assert 2 * halves.block_bytes == whole.block_bytes
    assert halves.group_of == {"l0": 0, "l1": 1}
    assert halves.description == whole.description
    assert halves.heads(3) == whole.heads(3).replace("/2*", "/1*")
    block = torch.zeros(whole.block_bytes, dtype=torch.uint8)
    parts = torch.zeros(whole.block_bytes, dtype=torch.uint8)
    whole.copy_out(1, block)
    for group, part in enumerate(parts.split(halves.block_bytes)):
        halves.copy_out(1, part, group)
    assert torch.equal(block, parts)
    halves.copy_in(parts[halves.block_bytes :], 3, 1)
    assert torch.equal(layers["l1"][3], layers["l1"][1])
    assert not torch.equal(layers["l0"][3], layers["l0"][1])


def test_layers_that_groups_cannot_share_evenly_are_refused() -> None:
    with pytest.raises(LayoutError, match="has 2 layers, which 3 layer groups"):
        PagedCache(interleaved(), BLOCKS, "B", 3)
    layers = interleaved()
    layers["l1"] = layers["l1"][:, :1].contiguous()
    with pytest.raises(LayoutError, match="unlike sizes"):
        PagedCache(layers, BLOCKS, "B", 2)
    # Alike in size and not in order: whole blocks may pass, heads cannot be told apart.
    layers["l1"] = torch.zeros(BLOCKS, TOKENS, HEADS, WIDTH).permute(0, 2, 1, 3)
    assert PagedCache(layers, BLOCKS, "B", 2).heads(3) == ""
    assert PagedCache(layers, BLOCKS, "B").heads(3) != ""
