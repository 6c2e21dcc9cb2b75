"""The command ``fxprune-search``."""

from fxprune.cli.command import main

__all__ = ["main"]
