"""New tensors from the user's: whichever way they are made, they hold what indexing gives, in memory of their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxprune.passes.rewriting import slicing as cutting
from fxprune.passes.rewriting.slicing import cut, room

KEPT = {n: torch.arange(0, n, 2) for n in (6, 10)} | {7: torch.tensor([0, 3, 4])}


@pytest.fixture(params=[False, True], ids=["small", "large"])
def large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param:
        monkeypatch.setattr(cutting, "_LARGE", 0)
        monkeypatch.setattr(cutting, "_BLOCK", 100)  # blocks of one row and of several, the last one shorter
        monkeypatch.setattr(cutting, "_LARGE_PAGES", 0)
    return bool(request.param)


@pytest.mark.parametrize("dims", [(), (0,), (1,), (0, 1), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("shape", [(10, 6, 7), (10, 7, 6, 10)])
def test_a_tensor_is_cut_along_its_dimensions(large: bool, shape: tuple[int, ...], dims: tuple[int, ...]) -> None:
    for source in (torch.randn(shape), nn.Parameter(torch.randn(shape), requires_grad=False), torch.arange(420.0).view(10, 6, 7).half()):
        kept = {d: KEPT[source.shape[d]] for d in dims}
        expected = source.detach()
        for d, indices in kept.items():
            expected = expected.transpose(0, d)[indices].transpose(0, d)
        found = cut(source, None, kept)
        assert torch.equal(found, expected) and found.dtype == source.dtype
        assert isinstance(found, nn.Parameter) == isinstance(source, nn.Parameter) and not found.requires_grad
        assert found.untyped_storage().data_ptr() != source.untyped_storage().data_ptr()
        assert found.untyped_storage().nbytes() == found.nbytes  # nothing of a larger block hangs on


def test_layout_stays(large: bool) -> None:
    source = torch.randn(10, 6, 3, 3).contiguous(memory_format=torch.channels_last)
    for kept in ({}, {0: KEPT[10], 1: KEPT[6]}):
        found = cut(source, None, kept)
        assert found.is_contiguous(memory_format=torch.channels_last) and not found.is_contiguous()
    assert torch.equal(found, source[::2, ::2])


def test_room_is_ordinary_memory() -> None:
    made = room((3, 1 << 20), torch.float32)  # large enough to ask for large pages
    made.fill_(2.0)
    assert made.sum() == 2.0 * made.numel()
    made.resize_(4, 1 << 20)
    assert made.shape == (4, 1 << 20)
