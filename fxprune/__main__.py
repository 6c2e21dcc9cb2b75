"""``python -m fxprune`` is ``fxprune-search``."""

from __future__ import annotations

import sys

from fxprune.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
