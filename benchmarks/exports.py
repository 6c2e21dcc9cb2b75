"""Which slim networks run where? ``python -m benchmarks.exports`` writes nine pruned networks for every runtime and runs them there.

Every cell is the largest difference from eager PyTorch on random images at another batch size than the file was made with, as a share of
the output's largest magnitude; for 8-bit integers it is the share of the outputs' variation that is noise. The table goes between the
markers of docs/export.md. Networks have random weights, images 64 pixels a side: what is compared are two ways to compute, not accuracies.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import fxprune
from fxprune.errors import FxPruneError
from fxprune.evaluation.accuracy import recalibrate_batchnorm
from fxprune.evaluation.running import call
from fxprune.exporting.formats import FORMATS, installed, tensors

SIZE = 64  # pixels a side: two are left at stride 32
SPARSITY = 0.43  # of every group, by weights that are random: what stays is scattered, and its widths are odd as often as not
TOLERANCE = 1e-4  # of the largest magnitude: float32 by other kernels
NOISE = 0.5  # of the variation, for 8 bits; the outputs of other images would be 2
BEGIN, END = "<!-- made by benchmarks/exports.py -->", "<!-- end -->"


def vit() -> nn.Module:
    """ViT-B/16 at a reduced size; torchvision's starts with a head of zeros, which would hide every difference."""
    model: nn.Module = torchvision.models.VisionTransformer(
        image_size=SIZE, patch_size=16, num_layers=6, num_heads=6, hidden_dim=384, mlp_dim=1536, num_classes=100
    )
    nn.init.normal_(model.get_parameter("heads.head.weight"))
    return model


def named(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model: nn.Module = torchvision.models.get_model(name, weights=None)
        return model

    return make


def calm(name: str) -> Callable[[], nn.Module]:
    """With branches that add little to what they are added to, as in a trained network: random ones make noise out of any rounding."""

    def make() -> nn.Module:
        model = named(name)()
        for module in model.modules():
            last = getattr(module, "bn3", None)
            if getattr(module, "use_res_connect", False):
                last = module.block[-1][1]  # type: ignore[index]
            if isinstance(last, nn.BatchNorm2d):
                nn.init.constant_(last.weight, 0.2)
        return model

    return make


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": named("resnet18"),
    "resnet50": calm("resnet50"),
    "mobilenet_v3_large": named("mobilenet_v3_large"),
    "efficientnet_b0": calm("efficientnet_b0"),
    **{name: named(name) for name in ("densenet121", "convnext_tiny", "swin_t")},
    "vit_b_16": vit,
    "deeplabv3_mobilenet": lambda: torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None),
}


def slimmed(model: nn.Module, example: Tensor, sparsity: float = SPARSITY, **options: Any) -> nn.Module:
    """``model`` pruned alike in every group, with statistics that fit, so that outputs have a size worth comparing."""
    torch.manual_seed(0)
    recalibrate_batchnorm(model, [torch.randn(8, *example.shape[1:])])
    slim: nn.Module = fxprune.compress(model.eval(), sparsity, example, **options)
    recalibrate_batchnorm(slim, [torch.randn(8, *example.shape[1:])])
    return slim.eval()


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return slimmed(NETWORKS[name](), torch.randn(2, 3, SIZE, SIZE))


RUNTIMES = (*FORMATS, "compile")
# What a runtime cannot do by itself, dense networks included: (network, runtime) -> why.
LIMITS = {
    (
        "swin_t",
        "executorch",
    ): "ExecuTorch's lowering of its rolled windows with a dynamic batch was not done after a minute of processor time",
}
# torch.compile makes and compiles C++ for these; for the others it stops after tracing and AOTAutograd, which is what a graph can break.
COMPILED = ("resnet18",)


def images(batch: int, seed: int) -> Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def outcome(slim: nn.Module, runtime: str, folder: Path, backend: str = "inductor") -> float:
    """How far ``runtime`` is from eager PyTorch, as the module's first lines say. Raises what ``fxprune.export`` does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what runtimes say about their own insides
        return _compiled(slim, backend) if runtime == "compile" else _exported(slim, runtime, folder)


def _exported(slim: nn.Module, runtime: str, folder: Path) -> float:
    chosen = FORMATS[runtime]
    path = folder / f"slim{chosen.suffix}"
    done = fxprune.export(slim, path, calibration=[images(8, seed) for seed in (1, 2)], verify=not chosen.quantized)
    if done.difference is not None:
        return done.difference
    x = images(5, 3)
    wanted = _first(slim, x)
    found = chosen.run(path, [x])[0].double()
    return float((found - wanted).square().mean() / (wanted - wanted.mean(0)).square().mean())


def _compiled(slim: nn.Module, backend: str) -> float:
    torch._dynamo.reset()
    ready: Any = torch.compile(slim, backend=backend)
    worst = 0.0
    for batch in (2, 5):
        x = images(batch, batch)
        torch._dynamo.mark_dynamic(x, 0)
        wanted = _first(slim, x)
        worst = max(worst, float((_first(ready, x) - wanted).abs().max() / wanted.abs().max()))
    return worst


def _first(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return tensors(call(model, x))[0].double()


def backend_of(name: str) -> str:
    return "inductor" if name in COMPILED else "aot_eager"


def cell(slim: nn.Module, name: str, runtime: str) -> str:
    if (name, runtime) in LIMITS:
        return "no"
    if runtime != "compile" and not installed((*FORMATS[runtime].writes, *FORMATS[runtime].runs)):
        return "-"
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = outcome(slim, runtime, Path(folder), backend_of(name))
        except FxPruneError as error:
            print(f"{name}, {runtime}: {error}", flush=True)
            return "**fails**"
    return f"{found:.0%}" if runtime != "compile" and FORMATS[runtime].quantized else f"{found:.0e}"


def rows(page: str) -> dict[str, dict[str, str]]:
    """The cells that stand between the markers of a page: network -> runtime -> text."""
    lines = [
        [part.strip() for part in line.strip("|").split("|")] for line in page.partition(BEGIN)[2].partition(END)[0].split("\n") if line
    ]
    return {line[0]: dict(zip(lines[0][1:], line[1:], strict=True)) for line in lines[2:]}


def table(found: dict[str, dict[str, str]]) -> str:
    header = [f"| network | {' | '.join(RUNTIMES)} |", "|---" * (1 + len(RUNTIMES)) + "|"]
    order = sorted(found, key=[*NETWORKS].index)
    return "\n".join([*header, *(f"| {n} | {' | '.join(found[n].get(runtime, '') for runtime in RUNTIMES)} |" for n in order)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--runtimes", default=",".join(RUNTIMES))
    parser.add_argument("--page", default="docs/export.md", help="where the table is; cells that were not asked for stay")
    asked = parser.parse_args()
    page = Path(asked.page)
    if BEGIN not in page.read_text():
        raise SystemExit(f"{page} has no line {BEGIN!r} for the table")
    for name in asked.networks.split(","):
        slim = made(name)
        cells = {runtime: cell(slim, name, runtime) for runtime in asked.runtimes.split(",")}
        print(name, cells, flush=True)
        text = page.read_text()
        known = rows(text)
        known[name] = {**known.get(name, {}), **cells}
        before, _, rest = text.partition(BEGIN)
        page.write_text(f"{before}{BEGIN}\n\n{table(known)}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
