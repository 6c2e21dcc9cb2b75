"""The small networks: names, shapes, shortcuts, and that the digits network learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fxprune.costs.profiling import profile
from fxprune.data.datasets import load_data
from fxprune.evaluation.accuracy import evaluate_accuracy
from fxprune.models.loading import load_weights
from fxprune.models.small import digits_net, resnet20, resnet56, vgg19, warped_digits_net
from fxprune.training.config import TrainConfig
from fxprune.training.fitting import train

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_shared_data = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there")


@pytest.mark.parametrize(
    ("model", "image", "classes"),
    [
        (digits_net(), (1, 8, 8), 10),
        (digits_net(num_classes=3), (1, 12, 16), 3),
        (resnet20(), (3, 32, 32), 10),
        (resnet20(num_classes=7), (3, 40, 32), 7),
        (vgg19(), (3, 32, 32), 100),
        (warped_digits_net(), (1, 16, 16), 10),
        (vgg19(batch_norm=False), (3, 64, 64), 100),
    ],
)
def test_logits_have_one_column_a_class(model: nn.Module, image: tuple[int, ...], classes: int) -> None:
    assert model.eval()(torch.randn(2, *image)).shape == (2, classes)


@pytest.mark.parametrize(("model", "millions"), [(resnet20(), 0.27), (resnet56(), 0.85)])
def test_cifar_resnets_have_the_size_of_the_paper(model: nn.Module, millions: float) -> None:
    # He 2016, table 6
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_cifar_resnet_parameter_names() -> None:
    names = set(dict(resnet20().named_parameters()))
    block = {f"{layer}.{kind}" for layer in ("bn1", "bn2") for kind in ("weight", "bias")} | {"conv1.weight", "conv2.weight"}
    blocks = {f"layer{stage}.{number}.{name}" for stage in (1, 2, 3) for number in range(3) for name in block}
    assert names == blocks | {"conv1.weight", "bn1.weight", "bn1.bias", "linear.weight", "linear.bias"}


def test_option_a_shortcut_subsamples_and_pads_on_both_sides() -> None:
    block = resnet20().get_submodule("layer2.0").eval()
    nn.init.zeros_(block.bn2.weight)  # type: ignore[arg-type, union-attr]
    nn.init.zeros_(block.bn2.bias)  # type: ignore[arg-type, union-attr]
    x = torch.rand(1, 16, 8, 8)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any() and not out[:, 24:].any()


def test_vgg19_has_nineteen_weighted_layers() -> None:
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in vgg19().modules()) == 19
    assert not any(isinstance(m, nn.BatchNorm2d) for m in vgg19(batch_norm=False).modules())


def test_digits_net_learns_the_digits_in_eight_epochs() -> None:
    data = load_data("digits")
    torch.manual_seed(0)
    model = digits_net()
    train(model, data.batches("train", 64, training=True), config=TrainConfig(epochs=8, lr=0.1, device="cpu"))
    assert evaluate_accuracy(model, data.batches("test")) >= 0.97


@needs_shared_data
def test_resnet20_takes_the_published_weights() -> None:
    model = resnet20()
    load_weights(model, SHARED / "models" / "resnet20_cifar10.safetensors")
    assert profile(model, torch.randn(1, 3, 32, 32)).macs == pytest.approx(40.9e6, rel=0.01)


@needs_shared_data
@pytest.mark.long
def test_resnet20_reaches_the_published_accuracy() -> None:
    model = resnet20()
    load_weights(model, SHARED / "models" / "resnet20_cifar10.safetensors")
    data = load_data(f"parquet:{SHARED / 'cifar10'}")
    assert evaluate_accuracy(model, data.batches("test", 250)) == pytest.approx(0.882, abs=0.001)
