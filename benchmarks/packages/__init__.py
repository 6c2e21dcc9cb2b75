"""Networks of packages outside torchvision and timm, built with random weights in small configurations.

Each module has a function ``networks``; ``benchmarks/requirements-coverage.txt`` names the packages. Nothing here is written around what
fxprune can do: a network is built as its package builds it, only smaller.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator

from benchmarks.packages.network import Network


def networks(patterns: tuple[str, ...] = ()) -> Iterator[Network]:
    """The networks whose names, or packages, fit one of the patterns; all without a pattern."""
    from benchmarks.packages import audio, imaging, language, science, tokens, vision

    for module in (vision, imaging, language, tokens, audio, science):
        for network in module.networks():
            if not patterns or any(fnmatch.fnmatchcase(n, p) for p in patterns for n in (network.name, network.family)):
                yield network
