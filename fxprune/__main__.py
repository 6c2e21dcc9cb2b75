"""``python -m fxprune`` is ``fxprune-search``."""

from __future__ import annotations

import sys

from fxprune import __version__


def main() -> int:
    if sys.argv[1:] == ["--version"]:
        print(f"fxprune {__version__}")
        return 0
    from fxprune.cli import main as search

    return search()


if __name__ == "__main__":
    sys.exit(main())
