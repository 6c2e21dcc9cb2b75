"""Data sets by their spec."""

from fxprune.data.datasets import Data, load_data

__all__ = ["Data", "load_data"]
