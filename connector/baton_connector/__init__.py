"""Baton's KV connector for vLLM.

vLLM loads it by ``kv_connector_module_path`` = ``baton_connector`` and ``kv_connector`` =
``BatonConnector``; ``kv_connector_extra_config`` has ``socket``, the path of the worker's Unix socket,
which all tensor parallel ranks use, and may have ``layer_groups``: in so many a step's blocks leave,
one after the other, while the step is computed.
"""

from .connector import BatonConnector
from .version import __version__

__all__ = ["BatonConnector", "__version__"]
