"""The networks of the paper and its like, whole: the zeroing oracle at uneven sparsities, at 32x32 and larger inputs."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn

import fxprune
from fxprune.models import small as models
from tests.passes.helpers import SPARSITIES, assert_accounted, assert_oracle, call, prime, pruned, stacked


def _torchvision(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, num_classes=10, **options)


# name -> (constructor, side of the image, least share of parameters that must go, long)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, float, bool]] = {
    "resnet20": (models.resnet20, 32, 0.4, False),
    "resnet56": (models.resnet56, 32, 0.4, False),
    "vgg19_cifar": (lambda: models.vgg19(10), 32, 0.5, False),
    "vgg19_cifar_plain": (lambda: models.vgg19(10, batch_norm=False), 32, 0.5, True),
    "resnet18": (_torchvision("resnet18"), 32, 0.4, False),
    "resnet50": (_torchvision("resnet50"), 64, 0.4, False),
    "googlenet": (_torchvision("googlenet", init_weights=False, aux_logits=False), 64, 0.4, False),
    "googlenet_aux": (_torchvision("googlenet", init_weights=False), 224, 0.4, True),
    "densenet121": (_torchvision("densenet121"), 32, 0.4, False),
    "mobilenet_v3_large": (_torchvision("mobilenet_v3_large"), 64, 0.4, False),
    "efficientnet_b0": (_torchvision("efficientnet_b0"), 64, 0.4, False),
    "vgg19": (_torchvision("vgg19"), 64, 0.4, True),
    "vgg19_bn": (_torchvision("vgg19_bn"), 64, 0.4, True),
    "resnet50_large": (_torchvision("resnet50"), 224, 0.4, True),
    "densenet121_large": (_torchvision("densenet121"), 160, 0.4, True),
}
CASES = [pytest.param(name, marks=pytest.mark.long) if spec[3] else name for name, spec in NETWORKS.items()]


@pytest.mark.parametrize("name", CASES)
def test_paper_network(name: str) -> None:
    make, side, share, _ = NETWORKS[name]
    torch.manual_seed(0)
    inputs = (torch.randn(2, 3, side, side),)
    model = prime(make(), inputs)
    graph = fxprune.analyze(model, inputs)
    assert_accounted(model, graph)
    draw = random.Random(name)
    policy = {g.name: draw.choice(SPARSITIES) for g in graph.groups if g.prunable}
    slim, rec = pruned(model, graph, policy, inputs)
    assert not any(g.notes for g in graph.groups if g.prunable)
    assert_oracle(model, graph, policy, inputs, slim, rec)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, slim))
    assert 1 - after / before >= share
    assert (rec.before.params, rec.after.params) == (before, after)
    larger = (torch.randn(3, 3, side + 32, side + 32),)
    with torch.no_grad():
        assert call(slim, larger).shape == call(model, larger).shape
        assert torch.equal(call(fxprune.compress(graph, {}), inputs), call(model, inputs))


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v3_large", "googlenet"])
def test_paper_network_trains(name: str) -> None:
    """One step in training mode, after which evaluation still runs and the running statistics have moved."""
    make, side, _, _ = NETWORKS[name]
    torch.manual_seed(0)
    inputs = (torch.randn(4, 3, side, side),)
    slim = fxprune.compress(make().eval(), 0.5, inputs).train()
    means = {n: b.clone() for n, b in slim.named_buffers() if n.endswith("running_mean")}
    optimizer = torch.optim.SGD(slim.parameters(), 0.01)
    call(slim, stacked(inputs)).square().mean().backward()
    optimizer.step()
    assert means and all(not torch.equal(b, means[n]) for n, b in slim.named_buffers() if n in means)
    assert torch.isfinite(call(slim.eval(), inputs)).all()
