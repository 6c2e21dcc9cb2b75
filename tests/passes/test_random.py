"""Random networks, composed by hypothesis from blocks, keep the zeroing oracle. What it found is kept in ``FOUND`` as named tests."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import fxprune
from tests.passes.composed import BLOCKS, ENTRIES, FORMS, HEADS, Composed, Spec
from tests.passes.helpers import (
    SPARSITIES,
    assert_accounted,
    assert_keep_all,
    assert_oracle,
    call,
    leaves,
    prime,
    pruned,
    skeleton,
    stacked,
)

PARTS = st.tuples(st.sampled_from(sorted(BLOCKS)), st.integers(0, 6), st.sampled_from(FORMS))
SPECS = st.builds(
    Spec,
    st.integers(4, 12),
    st.lists(PARTS, min_size=1, max_size=5).map(tuple),
    st.sampled_from(HEADS),
    st.sampled_from(ENTRIES),
    st.sampled_from(("auto", "heads", "head_dim")),
)
SEARCH = settings(deadline=None, database=None, derandomize=True, print_blob=False, suppress_health_check=list(HealthCheck))


def check(spec: Spec, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = spec.inputs()
    model = prime(Composed(spec), inputs)
    with torch.no_grad():
        want = call(model, inputs)
    if not all(torch.isfinite(w).all() and w.abs().max() < 1e6 for w in leaves(want)):
        return  # float noise of an ill-conditioned network says nothing about pruning
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


@settings(SEARCH, max_examples=300)
@given(spec=SPECS, seed=st.integers(0, 99))
def test_random_networks(spec: Spec, seed: int) -> None:
    check(spec, seed)


@pytest.mark.long
@settings(SEARCH, max_examples=3000, derandomize=False)
@given(spec=SPECS, seed=st.integers(0, 9999))
def test_many_random_networks(spec: Spec, seed: int) -> None:
    check(spec, seed)


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_every_block_alone(name: str) -> None:
    for variant in (0, 3):
        check(Spec(12, ((name, variant, "plain"),), "pool"), variant)


FOUND: dict[str, Spec] = {
    "one_index_buffer_on_two_groups": Spec(10, (("permuted", 2, "twice"),), "pool"),
    "one_index_buffer_read_with_getitem": Spec(8, (("conv", 5, "plain"), ("permuted", 1, "twice")), "last"),
    "rolled_then_permuted_twice": Spec(9, (("moved", 3, "plain"), ("permuted", 5, "twice")), "flatten"),
    "uneven_channel_shuffle": Spec(12, (("shuffle", 4, "residual"),), "pool"),
}


@pytest.mark.parametrize("name", sorted(FOUND))
def test_found_by_hypothesis(name: str) -> None:
    for seed in range(3):
        check(FOUND[name], seed)
