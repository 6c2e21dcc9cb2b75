"""Queries and keys as the bilinear form that they are: what the dimensions that went added to their products, the others make up for.

Where queries and keys lose dimensions of a head, each that is left may be what it was in the original, and yet their products lack what
went. The queries of a head are multiplied by the matrix M that brings q M kᵀ nearest to the original's products over all pairs of
calibration positions; M goes into the weights that make the queries. A shift of all keys changes no softmax, so keys are taken about
their mean.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxprune.repair.layers import Layer
from fxprune.repair.least_squares import RIDGES
from fxprune.repair.splitting import FIT, JUDGE, TUNE

_ATTENTION = (F.scaled_dot_product_attention,)
_PRODUCTS = (torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm", "__matmul__")
_MOVES = {
    *("view", "reshape", "unflatten", "flatten", "permute", "transpose", "swapaxes", "swapdims", "movedim", "contiguous"),
    *("split", "chunk", "unbind", "getitem", "squeeze", "unsqueeze", "clone", "tensor_split", "split_with_sizes"),
}
_PARTS = {"split", "chunk", "unbind", "tensor_split", "split_with_sizes"}
_SCALES = {"mul", "truediv", "div"}


@dataclass(frozen=True)
class Contraction:
    """A node that multiplies ``queries`` (..., positions, dimensions) with ``keys``, alike, or transposed where ``turned``."""

    node: fx.Node
    queries: fx.Node
    keys: fx.Node
    turned: bool


def contractions(graph: fx.Graph) -> list[Contraction]:
    """The products of two activations in ``graph``, in its order."""
    found = []
    for node in graph.nodes:
        known = node.op in ("call_function", "call_method") and (node.target in _ATTENTION or node.target in _PRODUCTS)
        if known and len(node.args) >= 2 and all(isinstance(one, fx.Node) and one.op != "get_attr" for one in node.args[:2]):
            found.append(Contraction(node, node.args[0], node.args[1], node.target not in _ATTENTION))
    return found


@dataclass(frozen=True)
class Maker:
    """The layer that makes queries, and which of its outputs each is: (heads, dimensions), or (dimensions,) where there is one head."""

    layer: Layer
    rows: Tensor


def maker(one: Contraction, layers: Mapping[fx.Node, Layer], values: Mapping[fx.Node, Any], interpreter: fx.Interpreter) -> Maker | None:
    """The linear layer whose outputs, moved but not changed, except by a factor, are the queries; None where there is no such one.

    Which output goes where is seen by sending their numbers the same way. ``values``: of all nodes, for some input.
    """
    chain: list[tuple[fx.Node, fx.Node, bool]] = []  # node, what it moves, whether it only scales
    node = one.queries
    while node not in layers:
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        sources = [n for n in node.all_input_nodes if isinstance(values.get(n), (Tensor, tuple, list))]
        scales = name in _SCALES and len(node.all_input_nodes) == 1
        if node.op not in ("call_method", "call_function") or len(sources) != 1 or not (name in _MOVES or scales):
            return None
        if len(node.users) != 1 and name not in _PARTS:
            return None
        chain.append((node, sources[0], scales))
        node = sources[0]
    layer, output = layers[node], values[node]
    if layer.form.space or layer.norm is not None or layer.apart or len(node.users) != 1:
        return None
    sent: dict[fx.Node, Any] = {node: torch.arange(output.shape[-1], device=output.device).expand_as(output)}
    for step, source, scales in reversed(chain):
        interpreter.env = {**values, source: sent[source]}
        sent[step] = sent[source] if scales else interpreter.run_node(step)
    numbers = sent[one.queries]
    if not isinstance(numbers, Tensor) or numbers.ndim < 3:
        return None
    heads = numbers[0, ..., :1, :]
    return Maker(layer, heads.squeeze(-2)) if bool((numbers == heads).all()) else None


class Products:
    """Sums over positions, for each head, of the products of slim and original queries, and of keys, with themselves and each other."""

    def __init__(self) -> None:
        self._sums: dict[int, dict[str, Tensor]] = {FIT: {}, TUNE: {}, JUDGE: {}}

    def add(self, role: int, queries: Tensor, keys: Tensor, wanted_queries: Tensor, wanted_keys: Tensor) -> None:
        """Rows (heads, positions, dimensions): of the slim network, and of the original for the same heads."""
        both = torch.cat([queries, wanted_queries], -1).double().cpu(), torch.cat([keys, wanted_keys], -1).double().cpu()
        new = {"q": both[0].mT @ both[0], "k": both[1].mT @ both[1], "m": both[1].sum(1), "n": torch.tensor(float(both[1].shape[1]))}
        into = self._sums[role]
        for name, value in new.items():
            into[name] = into[name] + value if name in into else value

    def _moments(self, *roles: int) -> tuple[Tensor, Tensor] | None:
        held = [self._sums[role] for role in roles if self._sums[role]]
        if not held:
            return None
        q, k, m, n = (sum((one[name] for one in held), torch.zeros(())) for name in ("q", "k", "m", "n"))
        m = m / n
        return q / n, k / n - m.unsqueeze(2) * m.unsqueeze(1)

    def matrix(self, width: int) -> tuple[Tensor | None, float, float]:
        """M (heads, width, width), or None where it does not help; and the squared errors of the products without and with it, as shares of
        the original's, where they are judged. ``width``: dimensions that are left."""
        train, tune, judge = self._moments(FIT), self._moments(TUNE), self._moments(JUDGE)
        judge = judge or tune or train
        if train is None or judge is None:
            return None, 0.0, 0.0
        ridge = RIDGES[1]
        if tune is not None:
            ridge = min((_error(_solved(train, width, ridge), tune, width), ridge) for ridge in RIDGES)[1]
        whole = self._moments(FIT, TUNE)
        assert whole is not None
        found = _solved(whole, width, ridge)
        before, after = _error(torch.eye(width, dtype=found.dtype).expand_as(found), judge, width), _error(found, judge, width)
        return (found if after < before else None), before, min(after, before)


def _solved(moments: tuple[Tensor, Tensor], width: int, ridge: float) -> Tensor:
    """The M nearest to one, as strongly as ``ridge`` says, that brings the products nearest to the original's."""
    q, k = moments
    eye = torch.eye(width, dtype=q.dtype)
    held = [_held(one[:, :width, :width], ridge) for one in (q, k)]
    lack = q[:, :width, width:] @ k[:, width:, :width] - q[:, :width, :width] @ k[:, :width, :width]
    found: Tensor = eye + torch.linalg.solve(held[1], torch.linalg.solve(held[0], lack).mT).mT
    return found


def _held(one: Tensor, ridge: float) -> Tensor:
    scale = one.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)[:, None, None]
    held: Tensor = one + ridge * scale * torch.eye(one.shape[1], dtype=one.dtype)
    return held


def _error(matrix: Tensor, moments: tuple[Tensor, Tensor], width: int) -> float:
    q, k = moments
    wanted = (q[:, width:, width:].mT * k[:, width:, width:]).sum()
    cross = (matrix * (q[:, :width, width:] @ k[:, width:, :width])).sum()
    own = ((matrix @ k[:, :width, :width]) * (q[:, :width, :width] @ matrix)).sum()
    return float((own - 2 * cross + wanted) / wanted.clamp_min(1e-30))


@torch.no_grad()
def change_queries(one: Maker, matrix: Tensor) -> None:
    """Multiply the queries that the layer makes with ``matrix`` (heads, dimensions, dimensions), in its weights."""
    rows = one.rows.reshape(len(matrix), -1).cpu()
    layer = one.layer
    weight = layer.weight.detach() if layer.form.kind == "linear" else layer.weight.detach().t()
    for tensor in (weight, *([] if layer.bias is None else [layer.bias.detach().unsqueeze(1)])):
        old = tensor[rows.flatten().to(tensor.device)].unflatten(0, rows.shape).double().cpu()  # (heads, dimensions, features)
        tensor[rows.flatten().to(tensor.device)] = (matrix.mT @ old).flatten(0, 1).to(tensor)


def by_head(x: Tensor, turned: bool = False) -> Tensor:
    """(heads, batch * positions, dimensions) of (batch, heads..., positions, dimensions)."""
    x = x.mT if turned else x
    return x.reshape(x.shape[0], -1, *x.shape[-2:]).transpose(0, 1).flatten(1, 2).float()


def picked(x: Tensor, kept: Sequence[Any]) -> Tensor:
    """``x`` with the positions ``kept`` of its axes, None for all."""
    for axis, indices in enumerate(kept):
        if indices is not None:
            x = x.index_select(axis, torch.as_tensor(indices, device=x.device))
    return x
