"""The networks of the coverage table: every float model of torchvision, and one model of each of timm's model modules."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """One network. ``options`` go to its constructor; ``inputs`` are tried in turn until the network takes one."""

    library: str
    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: tuple[Callable[[], Inputs], ...]
    options: dict[str, Any] = field(default_factory=dict)


def images(size: int, batch: int = 2) -> Callable[[], Inputs]:
    return lambda: (torch.randn(batch, 3, size, size),)


def clips(frames: int, size: int, batch: int = 1) -> Callable[[], Inputs]:
    return lambda: (torch.randn(batch, 3, frames, size, size),)


def pictures() -> Inputs:
    """Two pictures of different shapes, as detectors take them."""
    return ([torch.rand(3, 128, 128), torch.rand(3, 128, 160)],)


SIZE = 128  # what a network that takes any image is given: four pixels are left at stride 32

# Pattern -> (constructor options, inputs). Only what cannot, or need not, run on SIZE; the first pattern that fits is used.
TORCHVISION: dict[str, tuple[dict[str, Any], Callable[[], Inputs]]] = {
    "vit_h_14": ({"image_size": 56}, images(56)),  # 16 patches and the class token
    "vit_*": ({"image_size": 64}, images(64)),
    "inception_v3": ({"init_weights": False}, images(299)),  # its auxiliary head fits 299 alone
    "googlenet": ({"init_weights": False}, images(SIZE)),  # the initialisation draws from scipy for seconds
    "maxvit_t": ({}, images(224)),  # its partition of 7 divides no smaller stage
    "raft_*": ({}, lambda: (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128), 2)),  # two of the twelve updates
    "mvit_*": ({}, clips(16, 224)),  # its tables of positions have this size
    "s3d": ({}, clips(16, 224)),  # it ends in a pooling of 2 x 7 x 7
    # A network of random weights finds nothing above a threshold, and the oracle could see nothing in an empty list.
    "ssd*": ({"score_thresh": 0.0, "detections_per_img": 20, "topk_candidates": 20}, pictures),
    "fcos*": ({"min_size": 128, "max_size": 160, "score_thresh": 0.0, "detections_per_img": 20, "topk_candidates": 20}, pictures),
    "retinanet*": ({"min_size": 128, "max_size": 160, "score_thresh": 0.0, "detections_per_img": 20, "topk_candidates": 20}, pictures),
    "*rcnn*": (
        {
            "min_size": 128,
            "max_size": 160,
            "box_score_thresh": 0.0,
            "box_detections_per_img": 20,
            "rpn_pre_nms_top_n_test": 50,
            "rpn_post_nms_top_n_test": 20,
        },
        pictures,
    ),
}

TIMM: dict[str, tuple[dict[str, Any], Callable[[], Inputs]]] = {
    "samvit_*": ({"img_size": 256}, images(256, 1)),  # 1024 by default: 16 times the work for the same operations
    "sam2_hiera_*": ({}, images(224, 1)),  # its smallest input; 896 by default
    "mobilenetv5_*": ({}, images(256, 1)),  # 768 by default
    "gemma4_vit_*": ({}, images(192, 1)),  # 768 by default
    "qwen3_vit_*": ({}, images(256, 1)),  # 768 by default
    "deepseek_vit_*": ({}, images(126, 1)),  # its smallest input; 546 by default
    "csatv2*": ({}, images(256, 1)),  # 512 by default; its blocks of the cosine transform are 8 pixels wide
    "nasnetalarge": ({}, images(SIZE, 1)),
    "pnasnet5large": ({}, images(SIZE, 1)),
}

# What timm's small variants are called; of a module's models the one with the earliest of these, then the shortest name, is taken.
SMALL = (
    *("test_", "atto", "femto", "pico", "nano", "xxt", "xt", "tiny", "_t", "_xxs", "_xs", "small", "_s"),
    *("_m0", "_b0", "_050", "lite", "18", "mini", "_n"),
)


def cases(patterns: tuple[str, ...] = (), libraries: tuple[str, ...] = ("torchvision", "timm")) -> Iterator[Case]:
    """The networks whose names, or whose modules' names, fit one of the patterns; all without a pattern."""
    made = [*(_torchvision() if "torchvision" in libraries else ()), *(_timm() if "timm" in libraries else ())]
    for case in made:
        if not patterns or any(fnmatch.fnmatchcase(n, p) for p in patterns for n in (case.name, case.family)):
            yield case


def _torchvision() -> Iterator[Case]:
    from torchvision import models

    kinds = ("classification", "segmentation", "detection", "video", "optical_flow")
    kind_of = {n: k for k in kinds[1:] for n in models.list_models(module=getattr(models, k))}
    names = [n for n in models.list_models() if not n.startswith("quantized_")]
    for name in sorted(names, key=lambda n: (kinds.index(kind_of.get(n, kinds[0])), n)):
        kind = kind_of.get(name, kinds[0])
        default = clips(8, 64, 2) if kind == "video" else images(SIZE)
        options, inputs = next((v for p, v in TORCHVISION.items() if fnmatch.fnmatchcase(name, p)), ({}, default))
        options = {"weights": None, **({"weights_backbone": None} if kind in ("segmentation", "detection") else {}), **options}

        def build(name: str = name, options: dict[str, Any] = options) -> nn.Module:
            made: nn.Module = models.get_model(name, **options)
            return made

        yield Case("torchvision", name, kind, build, (inputs,), options)


def _timm() -> Iterator[Case]:
    import timm
    from timm.models._registry import _model_to_module

    families: dict[str, list[str]] = {}
    for name in timm.list_models():
        families.setdefault(_model_to_module[name], []).append(name)
    for family, names in sorted(families.items()):
        name = min(names, key=lambda n: (next((i for i, part in enumerate(SMALL) if part in n), len(SMALL)), len(n), n))
        options, inputs = next((v for p, v in TIMM.items() if fnmatch.fnmatchcase(name, p)), ({}, None))
        config = timm.get_pretrained_cfg(name)
        native = config.input_size[-1] if config else 224

        def build(name: str = name, options: dict[str, Any] = options) -> nn.Module:
            made: nn.Module = timm.create_model(name, pretrained=False, **options)
            return made

        # Networks of a fixed size refuse SIZE and get their own.
        yield Case("timm", name, family, build, (inputs,) if inputs else (images(SIZE), images(native)), options)
