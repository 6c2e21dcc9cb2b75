"""A network and the moving average of its weights (EMA): both lose the same channels, and both go on training."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fxprune
from fxprune.models import digits_net

torch.manual_seed(0)
images, labels = torch.rand(64, 1, 8, 8), torch.randint(0, 10, (64,))
model = digits_net()


def train(network: nn.Module, average: AveragedModel, steps: int) -> None:
    optimizer = torch.optim.SGD(network.parameters(), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
        average.update_parameters(network)


ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
train(model, ema, 10)

slim = fxprune.compress(model, 0.5, images[:1])
slim_ema = AveragedModel(slim, multi_avg_fn=get_ema_multi_avg_fn(0.9))
slim_ema.module.load_state_dict(fxprune.apply(slim, ema.module).state_dict())
slim_ema.n_averaged.copy_(ema.n_averaged)
before = copy.deepcopy(slim_ema.state_dict())
train(slim, slim_ema, 10)

assert fxprune.record(slim_ema.module).removed_units.keys() == fxprune.record(slim).removed_units.keys()
moved = sum(float((a - before[k]).abs().sum()) for k, a in slim_ema.state_dict().items() if a.is_floating_point())
record = fxprune.record(slim)
print(f"the slim average has {record.after.params:,} of {record.before.params:,} parameters and moved by {moved:.2f}")
assert moved > 0
