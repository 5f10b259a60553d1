"""What was found worth keeping by ``connector/fuzz``, read again."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "fuzz"))
from targets import TARGETS  # noqa: E402

CORPUS = Path(__file__).parent.parent.parent / "fuzz" / "corpus"


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_is_taken(name: str) -> None:
    cases = sorted((CORPUS / name).iterdir())
    assert len(cases) >= 2
    for case in cases:
        TARGETS[name](case.read_bytes())
