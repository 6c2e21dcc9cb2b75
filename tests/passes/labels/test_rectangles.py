"""Label tensors brought down to one axis."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import fx, nn

from fxprune.passes.labels.rectangles import feeds_attention, rectangle


class Heads(nn.Module):
    """A view into heads, and what is done with it: a product of two activations ("attention"), or a layer ("layer")."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use, self.out = use, nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.view(2, 5, 3, 4)
        if self.use == "attention":
            return heads.transpose(1, 2) @ heads.permute(0, 2, 3, 1)
        if self.use == "complex":
            return torch.view_as_complex(heads)
        return self.out(heads)  # type: ignore[no-any-return]


def view_of(use: str) -> fx.Node:
    found: fx.Node = next(node for node in fx.symbolic_trace(Heads(use)).graph.nodes if node.target == "view")
    return found


def test_one_varying_axis_is_taken_as_it_is() -> None:
    found = rectangle(torch.arange(4).view(1, 4, 1).expand(2, 4, 3), view_of("layer"), "auto")
    assert found.axis == 1 and found.labels.tolist() == [0, 1, 2, 3] and found.united is None and not found.chosen


def test_the_labels_are_no_row_of_something_large() -> None:
    large = torch.arange(4).expand(100000, 4)
    assert rectangle(large, view_of("layer"), "auto").labels.base is None


def test_one_label_fills_a_tensor_and_an_empty_tensor_has_none() -> None:
    found = rectangle(torch.full((2, 3), 7), view_of("layer"), "auto")
    assert found.axis is None and found.labels.tolist() == [7]
    assert len(rectangle(torch.zeros(0, 3, dtype=torch.long), view_of("layer"), "auto").labels) == 0


def test_of_two_axes_the_one_with_more_units_stays_and_its_slices_are_united() -> None:
    found = rectangle(torch.arange(12).view(3, 4), view_of("layer"), "auto")
    assert found.axis == 1 and found.labels.tolist() == [0, 1, 2, 3] and found.united is not None and not found.chosen
    left, right = found.united
    pairs = {(a, b) for a, b in zip(left.tolist(), right.tolist(), strict=True) if a != b}
    assert pairs == {(column, 4 * row + column) for row in (1, 2) for column in range(4)}


def test_units_are_counted_after_the_union() -> None:
    """Along axis 1 there are three indices but, as rows repeat the labels shifted, one unit; along axis 0 there is one as well."""
    shifted = torch.tensor([[0, 1, 2], [1, 2, 0]])
    found = rectangle(shifted, view_of("layer"), "auto")
    assert found.axis == 1 and found.united is not None
    assert len(np.unique(np.concatenate(found.united))) == 3


@pytest.mark.parametrize(("wish", "axis"), [("heads", 2), ("head_dim", 3), ("auto", 3)])
def test_in_an_attention_the_wish_counts(wish: str, axis: int) -> None:
    labels = torch.arange(12).view(1, 1, 3, 4).expand(2, 5, 3, 4)
    found = rectangle(labels, view_of("attention"), wish)
    assert found.axis == axis and found.chosen
    assert rectangle(labels, view_of("layer"), wish).axis == 3  # no attention: nothing to wish


def test_the_axis_that_separates_queries_keys_and_values_is_neither() -> None:
    labels = torch.arange(3 * 2 * 8).view(1, 3, 2, 8)  # the axis of three is longer than that of the heads
    found = {wish: rectangle(labels, view_of("attention"), wish).axis for wish in ("heads", "head_dim")}
    assert found == {"heads": 2, "head_dim": 3}


def test_a_real_and_an_imaginary_part_go_together() -> None:
    assert rectangle(torch.arange(4).view(2, 2), view_of("complex"), "auto").axis == 0


def test_a_product_of_activations_is_an_attention_and_a_layer_is_none() -> None:
    assert feeds_attention(view_of("attention")) and not feeds_attention(view_of("layer"))
