"""An ONNX file made smaller: ``python examples/from_onnx.py [folder]``.

onnx2torch makes a torch module of the file; that is pruned like any other and exported again. The file here is written on the spot, of a
network that learnt to tell stripes from checks; any other of opset 17 or less will do. Install ``fxprune[onnx,train]`` and ``onnx2torch``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy stripes and checks, (count, 3, 16, 16), and which is which."""
    generator = torch.Generator().manual_seed(seed)
    kinds, places = torch.randint(0, 3, (count,), generator=generator), torch.arange(16) // 2 % 2
    across, down = places.expand(16, 16).float(), places[:, None].expand(16, 16).float()
    shown = torch.stack([across, down, (across + down) % 2])[kinds]
    return shown[:, None] + 0.5 * torch.randn(count, 3, 16, 16, generator=generator), kinds


def written(file: Path) -> None:
    """A trained network as an ONNX file: what somebody else hands over."""
    torch.manual_seed(0)
    net = nn.Sequential()
    for i, (a, b) in enumerate(((3, 16), (16, 24), (24, 32))):
        net.append(nn.Sequential(nn.Conv2d(a, b, 3, padding=1, stride=1 + i % 2, bias=False), nn.BatchNorm2d(b), nn.ReLU()))
    net.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3)])
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    for step in range(30):
        x, y = images(64, step)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    # onnx2torch 1.5 reads opsets up to 17, which the exporter of before torch 2.5 still writes.
    options: dict[str, Any] = {"dynamo": False, "opset_version": 17, "input_names": ["image"], "dynamic_axes": {"image": {0: "batch"}}}
    torch.onnx.export(net.eval(), (images(2, 0)[0],), str(file), **options)


def main(folder: Path) -> None:
    import onnx2torch
    import onnxruntime

    written(folder / "network.onnx")
    model = onnx2torch.convert(str(folder / "network.onnx")).eval()
    x, y = images(256, 1000)
    calibration = list(images(256, 2000)[0].split(64))
    slim: Any = fxprune.compress(model, "macs=0.5", x[:2], calibration=calibration, repair="lstsq", verify=True)
    record = fxprune.record(slim)
    print(f"macs {record.before.macs} -> {record.after.macs}, parameters {record.before.params} -> {record.after.params}")

    done = fxprune.export(slim, folder / "slim.onnx")
    found = []
    for file in (folder / "network.onnx", done.path):
        session = onnxruntime.InferenceSession(str(file))
        scores = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        found.append(float((scores.argmax(1) == y).float().mean()))
        print(f"{file.name}: {file.stat().st_size} bytes, {found[-1]:.1%} right in ONNX Runtime")
    assert record.after.macs < 0.51 * record.before.macs and found[1] > found[0] - 0.1


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch))
