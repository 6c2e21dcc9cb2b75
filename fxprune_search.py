"""The command ``fxprune-search``.

This file is not in the package because importing the package takes seconds, and an interrupt in that time has to exit as any other does.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130


def main() -> int:
    """Run the command line of this process; returns its exit status (``fxprune.cli.main``)."""
    mine = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    earlier = {number: signal.signal(number, _leave) for number in mine}
    from fxprune.cli import main as run

    for number, handler in earlier.items():
        signal.signal(number, handler)
    return run()


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Leave at once: nothing has been written yet, and an exception would pass through imports that may turn it into another."""
    os.write(2, b"fxprune-search: interrupted; nothing had been started\n")
    os._exit(INTERRUPTED)
