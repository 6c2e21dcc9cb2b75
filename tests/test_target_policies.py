"""A target in place of a policy: ``compress(model, "macs=0.5", x)``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.allocation.target_policies import bounds_of
from fxprune.errors import PolicyError, TargetError
from tests.test_asking import X, net


def left(slim: Any) -> dict[str, float]:
    record = fxprune.record(slim)
    pairs = {
        "macs": (record.after.macs, record.before.macs),
        "params": (record.after.params, record.before.params),
        "memory": (record.after.peak_activation_bytes, record.before.peak_activation_bytes),
    }
    return {name: after / before for name, (after, before) in pairs.items()}


@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_the_target_is_met_to_the_unit(metric: str, share: float) -> None:
    slim = fxprune.compress(net(), f"{metric}={share}", X)
    assert share - 0.03 < left(slim)[metric] <= share  # one unit of this small network is worth up to three percent
    lost = fxprune.record(slim).policy.sparsity.values()
    assert max(lost) - min(lost) < 0.17  # the same share of every group, but for single units


def test_memory_and_sparsity() -> None:
    assert 0.55 < left(fxprune.compress(net(), "memory=0.6", X))["memory"] <= 0.6
    slim = fxprune.compress(net(), "sparsity=0.4", X)
    gone = 12 * 3 + 16 + 20  # stem and both downs are one group of three layers; the head is the output
    lost = sum(len(u) * (3 if name == "stem" else 1) for name, u in fxprune.record(slim).removed_units.items())
    assert 0.4 <= lost / gone < 0.44


@pytest.mark.parametrize("multiple", [2, 4])
def test_rounded_widths_meet_it_too(multiple: int) -> None:
    slim = fxprune.compress(net(), "macs=0.5", X, round_to=multiple)
    widths = {len(i) for dims in fxprune.record(slim).kept.values() for i in dims.values()}
    assert all(w % multiple == 0 for w in widths) and 0.5 - 0.12 * multiple / 2 < left(slim)["macs"] <= 0.5


def test_several_bounds_hold_at_once() -> None:
    for text in ("macs=0.5, params=0.3", "params = 0.3 macs=0.5"):
        found = left(fxprune.compress(net(), text, X))
        assert found["macs"] <= 0.5 and 0.25 < found["params"] <= 0.3


def test_limits_and_what_is_ignored_hold() -> None:
    slim = fxprune.compress(net(), "macs=0.6", X, most={"stem": 0.25}, ignore="blocks.0.up")
    removed = {name: len(units) for name, units in fxprune.record(slim).removed_units.items()}
    assert removed["stem"] <= 3 and "blocks.0.up" not in removed and left(slim)["macs"] <= 0.6


def test_batches_of_a_network_that_takes_one_dictionary() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, inputs: dict[str, Tensor]) -> Any:
            return self.c(self.b(self.a(inputs["x"] * inputs["mask"]).relu()).relu())

    model, batches = Net().eval(), [{"x": torch.randn(8, 4), "mask": torch.ones(8, 4)} for _ in range(3)]
    example, labels = (batches[0],), torch.zeros(8)
    ways = (batches, [(batch,) for batch in batches], [(batch, labels) for batch in batches], [((batch,), labels) for batch in batches])
    found = [fxprune.compress(model, "macs=0.5", example, calibration=given, repair="lstsq") for given in ways]
    assert fxprune.record(found[0]).repaired
    for slim in found[1:]:
        for name, tensor in found[0].state_dict().items():
            torch.testing.assert_close(slim.state_dict()[name], tensor)


def test_calibration_brings_the_error_tables() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(16, 3, 8, 8) for _ in range(2)]
    slim = fxprune.compress(net(), "macs=0.5", X, calibration=batches, repair="lstsq")
    record = fxprune.record(slim)
    assert record.policy.meta["strategy"] == "table" and 0.45 < left(slim)["macs"] <= 0.5 and record.repair == "lstsq"
    assert fxprune.record(fxprune.compress(net(), "macs=0.5", X)).policy.meta["strategy"] == "uniform"
    for multiple in (2, 4):
        rounded = fxprune.compress(net(), "macs=0.5", X, calibration=batches, round_to=multiple)
        assert all(len(i) % multiple == 0 for d in fxprune.record(rounded).kept.values() for i in d.values())
        assert 0.3 < left(rounded)["macs"] <= 0.5


def test_the_record_gives_the_same_again_and_travels_through_a_file(tmp_path: Path) -> None:
    slim = fxprune.compress(fxprune.analyze(net(), X), "params=0.4", importance="l1")
    policy = fxprune.record(slim).policy
    assert policy.options["importance"] == "l1" and policy.meta["bounds"] == {"params": 0.4}
    assert policy.meta["left"]["params"] == pytest.approx(left(slim)["params"])
    policy.save(tmp_path / "policy.json")
    assert torch.equal(fxprune.compress(net(), tmp_path / "policy.json")(X), slim(X))


def test_what_cannot_be_met_names_the_nearest() -> None:
    with pytest.raises(TargetError, match=r"'macs=0.01' cannot be met: with all that may go, 0.0\d+ of the macs are left") as caught:
        fxprune.compress(net(), "macs=0.01", X)
    assert isinstance(caught.value.nearest, fxprune.Policy)
    assert min(len(i) for d in fxprune.record(fxprune.compress(net(), caught.value.nearest)).kept.values() for i in d.values()) == 1
    with pytest.raises(TargetError, match="all that most= lets go.*; give a larger share; fxprune.explain.* says what is locked"):
        fxprune.compress(net(), "macs=0.3", X, most=0.2)
    for calibration in (None, [X]):
        with pytest.raises(TargetError, match="'sparsity=0.9' cannot be met: .* 0.[1-4].* of the output channels go; give a smaller share"):
            fxprune.compress(net(), "sparsity=0.9", X, most=0.2, calibration=calibration, importance="l2")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("latency=0.5", "has to be measured on candidates; search for it"),
        ("flops=0.5", "names 'flops'; it is METRIC=SHARE with one of macs, params"),
        ("macs=half", "'macs=half' needs a share between 0 and 1 of what is left"),
        ("macs=1.5", "share between 0 and 1"),
        ("sparsity=0", "share between 0 and 1 of what goes"),
        ("macs=0.5,0.7", "names '0.7'"),
        ("macs=0.5 macs=0.6", "names macs twice"),
    ],
)
def test_what_is_no_target_is_refused(text: str, words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        fxprune.compress(net(), text, X)


def test_a_path_is_still_a_path(tmp_path: Path) -> None:
    assert bounds_of("macs=0.5") == {"macs": 0.5} and bounds_of("sparsity=0.25") == {"sparsity": 0.75}
    with pytest.raises(PolicyError, match="cannot read the policy file"):
        fxprune.compress(net(), str(tmp_path / "a=0.5.json"), X)
    with pytest.raises(PolicyError, match="cannot read the policy file"):
        fxprune.compress(nn.Linear(3, 3), "policy.json", X)
