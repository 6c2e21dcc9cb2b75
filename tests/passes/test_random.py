"""Random networks, composed by hypothesis from blocks, keep the zeroing oracle. What it found is kept in ``FOUND`` as named tests."""

from __future__ import annotations

import contextlib
import copy
import random
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

import fxprune
from fxprune.passes.compat import tree_map_only
from tests.passes.composing.composed import BLOCKS, ENTRIES, FORMS, HEADS, HISTORIES, SIDE, Composed, Spec
from tests.passes.helpers import (
    SPARSITIES,
    assert_accounted,
    assert_keep_all,
    assert_oracle,
    call,
    gap,
    leaves,
    prime,
    pruned,
    skeleton,
    stacked,
    zeroed,
)

PARTS = st.tuples(st.sampled_from(sorted(BLOCKS)), st.integers(0, 6), st.sampled_from(FORMS))
SPECS = st.builds(
    Spec,
    st.integers(4, 12),
    st.lists(PARTS, min_size=1, max_size=5).map(tuple),
    st.sampled_from(HEADS),
    st.sampled_from(ENTRIES),
    st.sampled_from(("auto", "heads", "head_dim")),
    st.sampled_from((2, 1, 3)),
    st.sampled_from((SIDE, 4, 2, 1)),
    st.sampled_from(HISTORIES),
)
REAL = frozenset(name for name, make in BLOCKS.items() if make.__module__.endswith(("as_people_write", "by_values", "older_code")))
SEARCH = settings(deadline=None, database=None, derandomize=True, print_blob=False, suppress_health_check=list(HealthCheck))


def check(spec: Spec, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = spec.inputs()
    model = Composed(spec)
    try:
        prime(model, inputs)
    except ValueError:
        assert spec.side == 1  # an instance norm takes no single pixel in training
        return
    with torch.no_grad():
        want = call(model, inputs)
    if not all(torch.isfinite(w).all() and w.abs().max() < 1e6 for w in leaves(want)):
        return  # float noise of an ill-conditioned network says nothing about pruning
    with torch.no_grad():
        others = {name: given for name, given in elsewhere(spec).items() if sound(model, given)}
    remember(model, spec, inputs, others)
    graph = fxprune.analyze(model, inputs, attention=spec.attention)
    assert_accounted(model, graph)
    draw = random.Random(seed)
    policy = {g.name: draw.choice(SPARSITIES) for g in graph.groups if g.prunable}
    slim, rec = pruned(model, graph, policy, inputs)
    with torch.no_grad():
        got, double = call(slim, inputs), call(slim, stacked(inputs))
    assert skeleton(got) == skeleton(want)
    assert [t.shape for t in leaves(got)] == [t.shape for t in leaves(want)]
    assert_keep_all(model, inputs)
    assert_oracle(model, graph, policy, inputs, slim, rec)
    for one, two in zip(leaves(got), leaves(double), strict=True):
        assert torch.allclose(one, two[: len(one)], rtol=1e-3, atol=1e-4 * float(one.abs().max()) + 1e-6)
    with torch.no_grad():
        assert gap(got, call(slim, inputs)) == 0.0, "the second call differs"
        assert gap(want, call(model, inputs)) == 0.0, "the original's outputs changed"
    assert_elsewhere(model, graph, policy, inputs, slim, rec, others)


def elsewhere(spec: Spec) -> dict[str, Any]:
    """Inputs of other sizes than the example's."""
    larger = {"batch": spec.inputs(batch=spec.batch + 1)}
    fixed = spec.entry == "tokens" or spec.head in ("flatten", "last")  # whose linear layer knows the number of pixels
    return larger if fixed else larger | {"side": spec.inputs(side=spec.side + 4), "both": spec.inputs(4, spec.side + 2)}


def doubled(given: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, given)


def sound(model: nn.Module, inputs: Any) -> bool:
    """Whether the original takes these inputs: many arrangements have one size alone."""
    try:
        found = leaves(call(copy.deepcopy(model), inputs))
    except (RuntimeError, ValueError, AssertionError):
        return False
    return all(bool(torch.isfinite(t).all()) and bool(t.abs().max() < 1e6) for t in found)


def remember(model: nn.Module, spec: Spec, inputs: Any, others: dict[str, Any]) -> None:
    """What was done with a model before must not matter."""
    where = next(iter(others.values()), inputs) if spec.history.endswith("elsewhere") else inputs
    if spec.history.startswith("ran"):
        with torch.no_grad():
            call(model, where)
    elif spec.history.startswith("compressed"):
        with contextlib.suppress(fxprune.FxPruneError):  # the other size may be one that is refused
            fxprune.compress(model, 0.3, where)


def assert_elsewhere(
    model: nn.Module, graph: Any, policy: dict[str, float], inputs: Any, slim: nn.Module, rec: Any, others: dict[str, Any]
) -> None:
    """The oracle at other batches and resolutions than the example's, on the groups for which it is defined."""
    noted = {g.name for g in graph.groups if g.notes}
    part, kept = slim, rec.kept
    if noted:
        part, fewer = pruned(model, graph, {n: p for n, p in policy.items() if n not in noted}, inputs)
        kept = fewer.kept
    branched = any("a condition" in note for note in rec.notes)  # the user was told that other sizes may go another way
    specialised = rec.notes if any("specialised" in note or "fixed" in note for note in rec.notes) else ()
    with torch.no_grad():
        for name, given in others.items():
            whole = call(model, given)
            try:
                same = [t.shape for t in leaves(call(slim, given))] == [t.shape for t in leaves(whole)]
            except RuntimeError:  # the example's way may be none for other sizes
                if not branched or name == "batch":
                    raise
                continue
            if branched and not same and name != "batch":
                continue
            assert same, (name, specialised)
            found = gap(call(zeroed(model, kept), given), call(part, given))
            if found >= 1e-4:  # rounding, where the network is ill-conditioned
                found = gap(call(zeroed(model, kept).double(), doubled(given)), call(copy.deepcopy(part).double(), doubled(given)))
            assert found < 1e-4, f"relative error {found:.1e} at another {name}; {specialised}"
            fresh = gap(whole, call(copy.deepcopy(model), given))
            assert fresh == 0.0, f"the original differs by {fresh:.1e} at another {name}"


@settings(SEARCH, max_examples=400)
@given(spec=SPECS, seed=st.integers(0, 99))
def test_random_networks(spec: Spec, seed: int) -> None:
    check(spec, seed)


@pytest.mark.long
@settings(SEARCH, max_examples=10_000, derandomize=False)
@given(spec=SPECS, seed=st.integers(0, 9999))
def test_many_random_networks(spec: Spec, seed: int) -> None:
    check(spec, seed)


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_every_block_alone(name: str) -> None:
    for variant in range(7) if name in REAL else (0, 3):
        check(Spec(12, ((name, variant, "plain"),), "pool", history=HISTORIES[variant % len(HISTORIES)]), variant)


@pytest.mark.parametrize("name", sorted(REAL))
@pytest.mark.parametrize(("batch", "side"), [(1, SIDE), (2, 1), (1, 2)])
def test_sizes_of_one(name: str, batch: int, side: int) -> None:
    check(Spec(12, ((name, 1, "plain"), (name, 4, "residual")), "pool", batch=batch, side=side), 0)


FOUND: dict[str, Spec] = {
    "one_index_buffer_on_two_groups": Spec(10, (("permuted", 2, "twice"),), "pool"),
    "one_index_buffer_read_with_getitem": Spec(8, (("conv", 5, "plain"), ("permuted", 1, "twice")), "last"),
    "odd_at_another_size": Spec(12, (("strided", 3, "concat"), ("by_shape", 1, "input")), "dataclass", "keywords"),
    "rolled_then_permuted_twice": Spec(9, (("moved", 3, "plain"), ("permuted", 5, "twice")), "flatten"),
    "uneven_channel_shuffle": Spec(12, (("shuffle", 4, "residual"),), "pool"),
}


@pytest.mark.parametrize("name", sorted(FOUND))
def test_found_by_hypothesis(name: str) -> None:
    for seed in range(3):
        check(FOUND[name], seed)
