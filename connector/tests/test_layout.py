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
