"""The connector's version is part of an engine's compatibility: raise it when the layout of a block changes."""

__version__ = "0.1.0"
