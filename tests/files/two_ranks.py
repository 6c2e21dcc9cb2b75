"""What tests/files/test_apply.py runs in two processes: every rank prunes by its own data, then takes the channels of rank 0, and goes on
behind DDP and behind FSDP, which wants the network pruned before it is sharded."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fxprune
from tests.ranks import leave


def network() -> nn.Module:
    first, second = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 3)
    return nn.Sequential(first, nn.BatchNorm2d(12), nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    ddp = DistributedDataParallel(network())
    torch.manual_seed(10 + rank)  # from here on each rank has data of its own
    batches = [(torch.randn(8, 3, 8, 8), torch.randint(0, 4, (8,))) for _ in range(2)]
    own = fxprune.compress(ddp, 0.5, batches[0][0], calibration=batches)
    shared: list[Any] = [fxprune.record(own)]
    dist.broadcast_object_list(shared, src=0)
    slim = DistributedDataParallel(fxprune.apply(shared[0], ddp))
    optimizer = torch.optim.SGD(slim.parameters(), 0.1)
    nn.functional.cross_entropy(slim(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    kind = type(fxprune.record(slim)).__name__
    chosen = {name: units.tolist() for name, units in fxprune.record(own).removed_units.items()}
    taken = {name: units.tolist() for name, units in fxprune.record(slim).removed_units.items()}
    weights = [round(float(p.detach().double().sum()), 9) for p in slim.parameters()]
    refused = []
    sharded: Any = fully_shard(network())
    attempts = (functools.partial(fxprune.compress, sharded, 0.5, batches[0][0]), functools.partial(fxprune.apply, shared[0], sharded))
    for attempt in attempts:
        try:
            attempt()
        except fxprune.FxPruneError as error:
            refused.append(str(error))
    parts: Any = fully_shard(fxprune.apply(shared[0], ddp))
    expected = fxprune.apply(shared[0], ddp)(batches[0][0])
    equal = torch.allclose(parts(batches[0][0]), expected, atol=1e-6)
    optimizer = torch.optim.SGD(parts.parameters(), 0.1)
    nn.functional.cross_entropy(parts(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    state = get_model_state_dict(parts, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        found = fxprune.apply(shared[0], network())
        found.load_state_dict(state)
        fxprune.save(found, out / "slim.safetensors")
    told = {"refused": refused, "equal": equal, "behind_fsdp": type(fxprune.record(parts)).__name__}
    (out / f"{rank}.json").write_text(json.dumps({"chosen": chosen, "taken": taken, "weights": weights, "record": kind, **told}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
