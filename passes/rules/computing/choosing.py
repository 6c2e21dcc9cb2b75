"""Choices among channels, as a router makes them among experts, and what is computed of the positions of what was chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx

from fxprune.errors import UnsupportedError
from fxprune.passes.ir.nodes import leads_to, target_name
from fxprune.passes.labels.context import LabelContext
from fxprune.passes.labels.values import Value
from fxprune.passes.rules.computing.elementwise import CASTS, DIVISIONS, ELEMENTWISE
from fxprune.passes.rules.protocols import Rewriter
from fxprune.passes.rules.registry import functions, named

_CHOOSING = frozenset({"topk", "argmax", "max"})
_BETWEEN = frozenset({*CASTS, *ELEMENTWISE, *DIVISIONS, "truediv", "itruediv", "iadd", "imul", "view", "reshape"})


def chooses(ctx: LabelContext, node: fx.Node, x: Value, axis: int, count: int) -> bool:
    """Whether ``node`` chooses ``count`` of the channels of ``x`` along ``axis``, and not all of them. It is noted then."""
    vector = x.axes.get(axis)
    if vector is None or not 0 < count < len(vector):
        return False
    ctx.choose(node, axis, vector, count)
    return True


def is_chosen_from(node: fx.Node) -> bool:
    """Whether a choice is made from what ``node`` gives, or from what is computed of it element by element, or single channels of that are
    read (the share of one expert)."""
    return leads_to(
        node,
        lambda user: target_name(user) in _CHOOSING or (target_name(user) == "getitem" and _reads_one(user)),
        lambda user: target_name(user) in _BETWEEN,
    )


def _reads_one(node: fx.Node) -> bool:
    index: Any = node.args[1]
    source: Any = node.args[0].meta.get("val")  # type: ignore[union-attr]
    made: Any = node.meta.get("val")
    if not isinstance(source, torch.Tensor) or not isinstance(made, torch.Tensor):
        return False
    return (
        any(isinstance(i, int) for i in (index if isinstance(index, tuple) else (index,))) or made.shape[-1:] == (1,) != source.shape[-1:]
    )


def _classes(slim: Rewriter, node: fx.Node) -> None:
    value = slim.value(node)
    slim.set_argument(node, "num_classes", slim.count(value, value.ndim - 1))


@functions(F.one_hot, rewrite=_classes)
def one_hot(ctx: LabelContext, node: fx.Node, input: Value, num_classes: Any = -1) -> Any:
    """A row for each position, with a one there: columns beyond the channels that are chosen among (a sentinel's) stay."""
    picks, last = input.picks, input.ndim
    if picks is None or input.axes or not isinstance(num_classes, int) or num_classes < len(picks):
        return ctx.opaque(node, [input], "it is used as an index")
    beyond = ctx.fresh("one_hot", num_classes - len(picks))
    ctx.pin(beyond, "nothing is chosen there")
    ctx.followed.append(picks)
    return ctx.make(node, {last: np.concatenate([picks, beyond]) if len(beyond) else picks}, (last,))


def _bins(slim: Rewriter, node: fx.Node) -> None:
    left = slim.size(node, 0)
    slim.set_argument(node, "bins", left)
    slim.set_argument(node, "max", left - 1)


@functions(torch.histc, rewrite=_bins)
def histogram(ctx: LabelContext, node: fx.Node, input: Value, bins: Any = 100, min: Any = 0, max: Any = 0) -> Any:
    """How often each channel was chosen, where a bin is a channel."""
    picks = input.picks
    if picks is None or input.axes or (bins, min, max) != (len(picks), 0, len(picks) - 1):
        return ctx.opaque(node, [input], "its values are counted")
    ctx.followed.append(picks)
    return ctx.make(node, {0: picks}, (0,))


def _lengths(slim: Rewriter, node: fx.Node) -> None:
    if slim.pruned(node, 0):
        slim.set_argument(node, "minlength", slim.size(node, 0))


@named("bincount", inplace=False, rewrite=_lengths)
def bincount(ctx: LabelContext, node: fx.Node, input: Value, weights: Value | None = None, minlength: Any = 0) -> Any:
    """As ``histogram``, of whole numbers."""
    picks = input.picks
    if picks is None or input.axes or weights is not None or minlength != len(picks):
        return ctx.opaque(node, [v for v in (input, weights) if v is not None], "its values are counted")
    ctx.followed.append(picks)
    return ctx.make(node, {0: picks}, (0,))


def check_choice(slim: Rewriter, node: fx.Node, axis: int, count: int) -> None:
    """Raise ``UnsupportedError`` where fewer channels are left than are chosen."""
    left = slim.size(slim.argument(node, "input"), axis)
    if left < count:
        where = node.meta.get("where", node.name)
        raise UnsupportedError(f"{where}: {count} are chosen of what {left} would be left of; remove fewer of these experts")
