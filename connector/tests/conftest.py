import sys
from pathlib import Path

# The package is loaded from the source tree, by these tests and by the engine that they start.
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
