"""Part of an engine's compatibility: raise it whenever the layout of a block changes."""

__version__ = "0.1.0"
