"""Modules from ``torch.export`` for the tests."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import fx, nn

import fxprune
from tests.passes import helpers


def exported(model: nn.Module, inputs: Any, decomposed: bool = False, **options: Any) -> fx.GraphModule:
    """The module of ``model``'s exported program, in the training dialect or in the smaller set of operators it decomposes to."""
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (tuple(inputs), {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        program = torch.export.export(model, args, kwargs, **options)
        return (program.run_decompositions() if decomposed else program).module()


def assert_exported_sound(module: nn.Module, inputs: Any, sparsity: float = 0.5) -> tuple[nn.Module, Any]:
    """The oracle, copies and keep-all, on an exported module at one sparsity. Returns (slim, its coupling graph)."""
    graph = fxprune.analyze(module, inputs)
    policy = {g.name: sparsity for g in graph.groups if g.prunable}
    slim, rec = helpers.pruned(module, graph, policy, inputs)
    with torch.no_grad():
        want, got = helpers.call(module, inputs), helpers.call(slim, inputs)
    assert helpers.skeleton(want) == helpers.skeleton(got)
    assert [t.shape for t in helpers.leaves(want)] == [t.shape for t in helpers.leaves(got)]
    helpers.assert_oracle(module, graph, policy, inputs, slim, rec)
    helpers._assert_copies(slim, inputs, got)
    whole = fxprune.compress(module, 0.0, inputs)
    torch.manual_seed(1)
    want = helpers.call(module, inputs)
    torch.manual_seed(1)
    got = helpers.call(whole, inputs)
    assert all(torch.equal(a, b) for a, b in zip(helpers.leaves(want), helpers.leaves(got), strict=True))
    return slim, graph
