"""Networks that see: classifiers, detectors, segmentation, matching and vision transformers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks.packages.network import Inputs, Network, image, of


def yolo(config: str) -> Callable[[], nn.Module]:
    """A detector of ultralytics from its configuration; ``.model`` is what is trained and exported."""

    def build() -> nn.Module:
        kind = "RTDETRDetectionModel" if "rtdetr" in config else "DetectionModel"
        made: nn.Module = getattr(importlib.import_module("ultralytics.nn.tasks"), kind)(config, ch=3, nc=7, verbose=False)
        return made

    return build


def task(kind: str, config: str) -> Callable[[], nn.Module]:
    """A model of ultralytics for another task than detection."""
    return of(f"ultralytics.nn.tasks:{kind}", config, ch=3, nc=7, verbose=False)


def effdet(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        module = importlib.import_module("effdet")
        config = module.get_efficientdet_config(name)
        config.image_size = (128, 128)
        made: nn.Module = module.EfficientDet(config, pretrained_backbone=False)
        return made

    return build


def pair(batch: int, size: int) -> Inputs:
    """Two grey pictures, as matchers take them."""
    return ({"image0": torch.rand(batch, 1, size, size), "image1": torch.rand(batch, 1, size, size)},)


def picture_and_text(batch: int, size: int) -> Inputs:
    return {"image": torch.randn(batch, 3, 32, 32), "text": torch.randint(1, 60, (batch, 12))}


def networks() -> Iterator[Network]:
    for name in ("yolov3-tinyu", "yolov5n", "yolov6n", "yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n"):
        yield Network("ultralytics", name, yolo(f"{name}.yaml"), image(), 64, 96)
    yield Network("ultralytics", "yolo11n-seg", task("SegmentationModel", "yolo11n-seg.yaml"), image(), 64, 96)
    yield Network(
        "ultralytics", "yolo11n-pose", of("ultralytics.nn.tasks:PoseModel", "yolo11n-pose.yaml", ch=3, verbose=False), image(), 64, 96
    )
    yield Network("ultralytics", "yolo11n-cls", task("ClassificationModel", "yolo11n-cls.yaml"), image(), 64, 96)

    plain = {"encoder_name": "resnet18", "encoder_weights": None, "classes": 3}
    for name in ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "DeepLabV3Plus"):
        side = 128 if name == "PAN" else 64
        yield Network("segmentation-models-pytorch", name, of(f"segmentation_models_pytorch:{name}", **plain), image(), side, side + 32)
    light = {"encoder_name": "timm-mobilenetv3_small_100", "encoder_weights": None, "classes": 3}
    yield Network("segmentation-models-pytorch", "UPerNet", of("segmentation_models_pytorch:UPerNet", **light), image(), 64, 96)
    tiny = {"encoder_name": "mit_b0", "encoder_weights": None, "classes": 3}
    yield Network("segmentation-models-pytorch", "Segformer", of("segmentation_models_pytorch:Segformer", **tiny), image(), 64, 96)

    yield Network("effdet", "tf_efficientdet_lite0", effdet("tf_efficientdet_lite0"), image(), 128, 256)
    yield Network(
        "efficientnet-pytorch", "efficientnet-b0", of("efficientnet_pytorch:EfficientNet.from_name", "efficientnet-b0"), image(), 64, 96
    )
    for name, size in (("shakeshakeresnet20_2x16d_cifar10", 32), ("igcv3_w1", 224), ("sqnxt23v5_w1", 224), ("vovnet27s", 224)):
        yield Network("pytorchcv", name, of("pytorchcv.model_provider:get_model", name, pretrained=False), image(), size, size)
    yield Network(
        "facenet-pytorch", "InceptionResnetV1", of("facenet_pytorch:InceptionResnetV1", classify=True, num_classes=20), image(), 96, 128
    )
    yield Network("torchxrayvision", "DenseNet", of("torchxrayvision.models:DenseNet", weights=None), image(1), 64, 96)
    yield Network("kornia", "HyNet", of("kornia.feature:HyNet", pretrained=False), image(1), 32, 32, 4)
    yield Network("kornia", "LoFTR", of("kornia.feature:LoFTR", pretrained=None), pair, 64, 96, 1)
    clip = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 4, "layers": 2},
    }
    yield Network("open-clip-torch", "CLIP", of("open_clip.model:CLIP", **clip), picture_and_text, 32, 32)

    vit = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 64, "depth": 2, "heads": 4, "mlp_dim": 96}
    yield Network("vit-pytorch", "ViT", of("vit_pytorch:ViT", **vit, dim_head=16), image(), 32, 24)
    yield Network("vit-pytorch", "SimpleViT", of("vit_pytorch:SimpleViT", **vit, dim_head=16), image(), 32, 24)
    yield Network("vit-pytorch", "DeepViT", of("vit_pytorch.deepvit:DeepViT", **vit, dim_head=16), image(), 32, 24)
    yield Network("vit-pytorch", "CaiT", of("vit_pytorch.cait:CaiT", **vit, cls_depth=1, dim_head=16), image(), 32, 24)
    yield Network(
        "vit-pytorch",
        "CCT",
        of(
            "vit_pytorch.cct:CCT",
            img_size=32,
            embedding_dim=64,
            n_conv_layers=1,
            kernel_size=3,
            stride=2,
            padding=1,
            num_layers=2,
            num_heads=4,
            mlp_ratio=2,
            num_classes=5,
        ),
        image(),
        32,
        48,
    )
    yield Network(
        "vit-pytorch",
        "CvT",
        of("vit_pytorch.cvt:CvT", num_classes=5, s1_emb_dim=16, s2_emb_dim=32, s3_emb_dim=64, s2_heads=2, s3_heads=4, s3_depth=2),
        image(),
        64,
        96,
    )
    yield Network(
        "vit-pytorch",
        "LeViT",
        of("vit_pytorch.levit:LeViT", image_size=64, num_classes=5, dim=(32, 48), depth=1, heads=(2, 3), mlp_mult=2),
        image(),
        64,
        64,
    )
    yield Network(
        "vit-pytorch",
        "MobileViT",
        of(
            "vit_pytorch.mobile_vit:MobileViT",
            image_size=(64, 64),
            dims=[24, 32, 40],
            channels=[16, 16, 24, 24, 32, 32, 40, 40, 48, 48, 64],
            num_classes=5,
        ),
        image(),
        64,
        128,
    )
    yield Network(
        "vit-pytorch",
        "MaxViT",
        of("vit_pytorch.max_vit:MaxViT", num_classes=5, dim_conv_stem=16, dim=16, dim_head=8, depth=(1, 1), window_size=4),
        image(),
        32,
        64,
    )
    yield Network(
        "vit-pytorch",
        "NesT",
        of("vit_pytorch.nest:NesT", image_size=32, patch_size=4, dim=32, heads=2, num_hierarchies=2, block_repeats=(1, 1), num_classes=5),
        image(),
        32,
        32,
    )
    yield Network(
        "vit-pytorch",
        "XCiT",
        of(
            "vit_pytorch.xcit:XCiT",
            image_size=32,
            patch_size=8,
            num_classes=5,
            dim=64,
            depth=2,
            cls_depth=1,
            heads=4,
            dim_head=16,
            mlp_dim=96,
        ),
        image(),
        32,
        24,
    )
    yield Network("vit-pytorch", "RvT", of("vit_pytorch.rvt:RvT", **vit, use_rotary=True), image(), 32, 24)
    yield Network(
        "vit-pytorch",
        "Twins-SVT",
        of(
            "vit_pytorch.twins_svt:TwinsSVT",
            num_classes=5,
            s1_emb_dim=16,
            s1_local_patch_size=2,
            s2_emb_dim=32,
            s2_local_patch_size=2,
            s2_global_k=2,
            s3_emb_dim=48,
            s3_depth=1,
            s3_local_patch_size=2,
            s3_global_k=2,
            s4_emb_dim=64,
            s4_depth=1,
            s4_local_patch_size=1,
            s4_global_k=1,
        ),
        image(),
        64,
        128,
    )
