"""New tensors from the user's: the kept indices of each dimension.

Most of the time that a large weight takes goes to the system, which hands out fresh memory page by page: it is asked for large pages,
and what is cut along several dimensions goes through in blocks, so that nothing as large as the weight lies between.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

_BLOCK = 1 << 18  # numbers; what is between two selections stays in a core's cache
_LARGE = 32 << 20  # bytes; the C library never keeps more for the next caller, so that all of it would be fresh memory
_LARGE_PAGES = 1 << 20
_madvise: Any = ctypes.CDLL(None).madvise if sys.platform == "linux" else None


def cut(source: torch.Tensor, values: torch.Tensor | None, dims: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """A copy of ``source`` with only the kept indices of each dimension (or with new ``values``); layout and parameter-ness stay."""
    if values is not None:
        made = select(values.to(source.device), dims)
    else:
        made = select(source.detach() if torch.is_grad_enabled() else source, dims)
    return like(source, made)


def like(source: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """``made``, as a parameter where ``source`` is one."""
    kind = type(source)
    if kind is torch.Tensor or kind is not nn.Parameter and not isinstance(source, nn.Parameter):  # the first are quicker to ask
        return made
    return nn.Parameter(made, source.requires_grad)


def select(source: torch.Tensor, dims: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """The kept indices of each dimension in new memory; the layout stays."""
    if source.layout is not torch.strided:  # sparse: has neither bytes of its own nor strides
        made = source.clone()
        for dim, indices in dims.items():
            made = made.index_select(dim, indices.to(made.device))
        return made
    on_cpu = source.is_cpu
    if on_cpu and source.nbytes >= _LARGE and source.is_contiguous():
        return _select_large(source, dims)
    if not dims:
        return torch.empty_like(source) if source.is_meta else source.clone()
    made = source
    for dim, indices in dims.items():
        made = made.index_select(dim, indices if on_cpu else indices.to(made.device))
    if not source.is_contiguous() and source.ndim == 4 and source.is_contiguous(memory_format=torch.channels_last):
        return made.contiguous(memory_format=torch.channels_last)
    return made


def _select_large(source: torch.Tensor, dims: Mapping[int, torch.Tensor]) -> torch.Tensor:
    out = room([len(dims[d]) if d in dims else n for d, n in enumerate(source.shape)], source.dtype)
    rows, inner = dims.get(0), [(d, indices) for d, indices in dims.items() if d]
    if not inner:
        return out.copy_(source) if rows is None else torch.index_select(source, 0, rows, out=out)
    step = max(_BLOCK // source[0].numel(), 1)
    for first in range(0, len(out), step):
        block = source[first : first + step] if rows is None else source.index_select(0, rows[first : first + step])
        for dim, indices in inner[:-1]:
            block = block.index_select(dim, indices)
        torch.index_select(block, *inner[-1], out=out[first : first + step])
    return out


@cache
def keep_freed_memory() -> None:
    """Have the C library keep what a candidate of a search gives back, for the next one, whose time would go to page faults otherwise.

    glibc takes its bounds for that from the largest piece that was freed: one just below the most that it looks at is taken, unused, and
    freed. Up to 64 MB then stay with the process, as they do in one that has ever freed a tensor of that size.
    """
    torch.empty(_LARGE - (1 << 16), dtype=torch.uint8)


def room(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory for a tensor, which Linux is asked to back by large pages: first use of each page costs a call of the system."""
    made = torch.empty(shape, dtype=dtype, device="cpu")
    size = made.numel() * made.element_size()
    if _madvise is not None and size >= _LARGE_PAGES:
        first = -(-made.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (made.data_ptr() + size - first) // mmap.PAGESIZE * mmap.PAGESIZE
        _madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)  # advice: that it is refused changes nothing
    return made
