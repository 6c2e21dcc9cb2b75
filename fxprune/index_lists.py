"""Lists of ascending indices as text, "0-3,7", which is short and can be read; files and policies hold them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxprune.errors import FileError

MOST = 2**24  # indices in the lists of one record; the largest networks have some millions


def ranges(indices: Tensor) -> str:
    """Ascending whole numbers, a LongTensor of shape (n,), as text: runs from first to last, separated by commas."""
    if len(indices) == 0:
        return ""
    breaks = (indices.diff() != 1).nonzero().flatten() + 1
    runs = torch.tensor_split(indices, breaks.cpu())
    return ",".join(str(int(run[0])) if len(run) == 1 else f"{int(run[0])}-{int(run[-1])}" for run in runs)


def indices(text: Any) -> Tensor:
    """The LongTensor that ``ranges`` wrote as ``text``. Raises ``FileError`` for text that is not ascending ranges of a sane size."""
    runs: list[tuple[int, int]] = []
    for run in str(text).split(",") if text != "" else ():
        first, dash, last = run.partition("-")
        last = last if dash else first
        # A number is read only once it is known to be short: files come from strangers.
        plain = all(part.isascii() and part.isdecimal() and len(part) < 12 for part in (first, last))
        if not plain or int(last) < int(first) or (runs and int(first) <= runs[-1][1]):
            raise FileError(f"its record is damaged: {str(text)[:40]!r} is no ascending list of ranges")
        runs.append((int(first), int(last)))
    if sum(last - first + 1 for first, last in runs) > MOST:
        raise FileError(f"its record is damaged: {str(text)[:40]!r} names more than {MOST} channels")
    return torch.cat([torch.empty(0, dtype=torch.int64), *(torch.arange(first, last + 1) for first, last in runs)])
