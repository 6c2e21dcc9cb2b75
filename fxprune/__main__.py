"""``python -m fxprune`` is ``fxprune-search``; ``--version`` alone is answered without loading torch."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version


def main() -> int:
    if sys.argv[1:] == ["--version"]:
        try:
            print(f"fxprune {version('fxprune')}")
        except PackageNotFoundError:
            print("fxprune, not installed: run from its source folder")
        return 0
    from fxprune.cli import main as search

    return search()


if __name__ == "__main__":
    sys.exit(main())
