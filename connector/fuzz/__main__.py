"""Looks for bytes that the connector does not take well, guided by the code that they reach:

    python connector/fuzz TARGET fuzz/libfuzzer/found/TARGET fuzz/corpus/TARGET -max_total_time=3600

needs ``pip install atheris`` beside vLLM. Arguments behind the target are libFuzzer's."""

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent.parent))
with atheris.instrument_imports(include=["baton_connector"]):
    from targets import TARGETS

name = sys.argv.pop(1)
if name not in TARGETS:
    sys.exit(f"{name!r} is no target: expected one of {', '.join(TARGETS)}")
atheris.Setup(sys.argv, TARGETS[name])
atheris.Fuzz()
