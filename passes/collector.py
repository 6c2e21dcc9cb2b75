"""Python's cyclic garbage collector, paused while a network is analysed or rewritten."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """No automatic collections inside. A graph of many nodes is many new objects that all stay, and a full collection in the middle walks
    over every one of them and over the model's, which doubles the time on large networks. Where it was off already, it stays off."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
