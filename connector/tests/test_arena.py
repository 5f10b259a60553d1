from pathlib import Path

import pytest
import torch
from fakes import KEY, OTHER_KEY

from baton_connector.arena import Arena, ArenaError, ExportSlots


def file_of(path: Path, size: int) -> str:
    path.write_bytes(bytes(size))
    return str(path)


def test_slots_are_the_file(tmp_path: Path) -> None:
    path = file_of(tmp_path / "arena", 64 * 3)
    arena = Arena(path, 64, range(1), range(1, 3))
    arena.slot(2)[:3] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    assert Path(path).read_bytes()[128:131] == b"\x01\x02\x03"
    Path(path).unlink()
    assert arena.slot(2)[1] == 2, "the mapping outlives the file"
    assert [s for s in (-1, 0, 1, 2, 3, "1", True) if arena.is_import(s)] == [1, 2]


def test_an_arena_that_is_none_is_an_error(tmp_path: Path) -> None:
    path = file_of(tmp_path / "arena", 64)
    one, none = range(1), range(0)
    for layout in [(64, one, range(1, 2)), (0, one, none), (64, none, none), (64, range(-1, 1), one)]:
        with pytest.raises(ArenaError):
            Arena(path, *layout)
    with pytest.raises(ArenaError):
        Arena(str(tmp_path / "none"), 64, one, none)


def test_a_rank_has_slots_of_its_own(tmp_path: Path) -> None:
    arena = Arena(file_of(tmp_path / "arena", 64 * 8), 64, range(2, 4), range(6, 8))
    assert [slot for slot in range(8) if arena.is_import(slot)] == [6, 7]
    slots = ExportSlots(arena.exports)
    assert [slots.take(KEY), slots.take(OTHER_KEY), slots.take(KEY)] == [2, 3, None]
    assert slots.release(3) and not slots.release(0)


def test_a_quarter_of_the_slots_is_kept_for_who_has_none() -> None:
    slots = ExportSlots(range(8))
    mine = [slots.take(KEY) for _ in range(6)]
    assert sorted(s for s in mine if s is not None) == list(range(6))
    assert slots.take(KEY) is None and slots.open_to_all == 0
    assert slots.take(OTHER_KEY) == 6
    assert slots.take(OTHER_KEY) is None
    assert slots.release(0) and slots.release(1)
    assert slots.open_to_all == 1
    assert slots.take(OTHER_KEY) == 7
    assert not slots.release(0), "it is free already"


def test_few_slots_are_all_for_anybody() -> None:
    slots = ExportSlots(range(2))
    assert [slots.take(KEY), slots.take(KEY), slots.take(OTHER_KEY)] == [0, 1, None]
