import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The package is loaded from the source tree, by these tests and by the engine that they start.
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from agent import Agent  # noqa: E402
from engine import MODEL, VLLM, Engine  # noqa: E402


@pytest.fixture(scope="session")
def agent() -> Iterator[Agent]:
    agent = Agent(export_slots=64, import_slots=8)
    yield agent
    agent.close()


@pytest.fixture(scope="session")
def engine(agent: Agent, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One for all tests: it takes a minute to start."""
    assert VLLM and MODEL
    engine = Engine(VLLM, MODEL, agent.path, tmp_path_factory.mktemp("vllm") / "vllm.log")
    try:
        engine.wait_ready()
        yield engine
    finally:
        engine.stop()
