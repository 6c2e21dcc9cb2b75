"""Every network of the zoo, compressed at uneven sparsities, passes the zeroing oracle and keeps the contract."""

from __future__ import annotations

import pytest
import torch

from tests.passes.helpers import assert_sound, prime
from tests.passes.zoo.networks import ZOO

SEEDS = (0, 1)
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", sorted(ZOO))
def test_compresses_soundly(name: str, seed: int) -> None:
    network = ZOO[name]
    torch.manual_seed(seed)
    inputs = network.inputs()
    model = prime(network.make(), inputs)
    assert_sound(model, inputs, exact=network.exact, seed=seed, locked=network.locked)
