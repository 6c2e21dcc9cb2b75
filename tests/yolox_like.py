"""A detector in the style of YOLOX: a Focus stem, CSP stages with spatial pyramid pooling, a PAFPN and a decoupled head without anchors,
whose predictions are decoded on grids that the head makes in ``forward`` and keeps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BaseConv(nn.Module):
    def __init__(self, c1: int, c2: int, k: int, s: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, (k - 1) // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(c2, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.bn(self.conv(x)))
        return y


class DWConv(nn.Module):
    def __init__(self, c1: int, c2: int, k: int) -> None:
        super().__init__()
        self.dconv, self.pconv = BaseConv(c1, c1, k, groups=c1), BaseConv(c1, c2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pconv(self.dconv(x))
        return y


class Bottleneck(nn.Module):
    def __init__(self, c: int, shortcut: bool = True) -> None:
        super().__init__()
        self.conv1, self.conv2, self.use_add = BaseConv(c, c, 1), BaseConv(c, c, 3), shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(self.conv1(x))
        return y + x if self.use_add else y


class SPPBottleneck(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = BaseConv(c, c // 2, 1), BaseConv(c // 2 * 4, c, 1)
        self.m = nn.ModuleList(nn.MaxPool2d(k, 1, k // 2) for k in (3, 5, 7))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        y: Tensor = self.conv2(torch.cat([x] + [m(x) for m in self.m], dim=1))
        return y


class CSPLayer(nn.Module):
    def __init__(self, c1: int, c2: int, n: int, shortcut: bool = True) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = BaseConv(c1, c2 // 2, 1), BaseConv(c1, c2 // 2, 1), BaseConv(c2, c2, 1)
        self.m = nn.Sequential(*(Bottleneck(c2 // 2, shortcut) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv3(torch.cat((self.m(self.conv1(x)), self.conv2(x)), dim=1))
        return y


class Focus(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = BaseConv(12, c, 3)

    def forward(self, x: Tensor) -> Tensor:
        corners = x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]
        y: Tensor = self.conv(torch.cat(corners, dim=1))
        return y


class PAFPN(nn.Module):
    def __init__(self, w: int = 16) -> None:
        super().__init__()
        self.stem = Focus(w)
        self.dark2 = nn.Sequential(BaseConv(w, 2 * w, 3, 2), CSPLayer(2 * w, 2 * w, 1))
        self.dark3 = nn.Sequential(BaseConv(2 * w, 3 * w, 3, 2), CSPLayer(3 * w, 3 * w, 2))
        self.dark4 = nn.Sequential(BaseConv(3 * w, 4 * w, 3, 2), SPPBottleneck(4 * w), CSPLayer(4 * w, 4 * w, 1, shortcut=False))
        self.lateral, self.up = BaseConv(4 * w, 3 * w, 1), nn.Upsample(scale_factor=2, mode="nearest")
        self.c3_p4, self.down, self.c3_n3 = CSPLayer(6 * w, 3 * w, 1, False), BaseConv(3 * w, 3 * w, 3, 2), CSPLayer(6 * w, 4 * w, 1, False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x1 = self.dark3(self.dark2(self.stem(x)))
        fpn = self.lateral(self.dark4(x1))
        p1 = self.c3_p4(torch.cat([self.up(fpn), x1], 1))
        return p1, self.c3_n3(torch.cat([self.down(p1), fpn], 1))


class Head(nn.Module):
    """Raw predictions with their grids in training, decoded boxes (x, y, w, h, objectness, classes) in evaluation."""

    def __init__(self, classes: int, w: int = 16) -> None:
        super().__init__()
        self.num_classes, self.n_anchors, self.strides = classes, 1, (8, 16)
        self.stems = nn.ModuleList(BaseConv(c * w, 2 * w, 1) for c in (3, 4))
        self.cls_convs = nn.ModuleList(nn.Sequential(DWConv(2 * w, 2 * w, 3), DWConv(2 * w, 2 * w, 3)) for _ in range(2))
        self.reg_convs = nn.ModuleList(nn.Sequential(BaseConv(2 * w, 2 * w, 3), BaseConv(2 * w, 2 * w, 3)) for _ in range(2))
        self.cls_preds = nn.ModuleList(nn.Conv2d(2 * w, classes, 1) for _ in range(2))
        self.reg_preds = nn.ModuleList(nn.Conv2d(2 * w, 4, 1) for _ in range(2))
        self.obj_preds = nn.ModuleList(nn.Conv2d(2 * w, 1, 1) for _ in range(2))
        self.grids: list[Any] = [torch.zeros(1)] * 2

    def grid(self, output: Tensor, k: int) -> Tensor:
        ny, nx = output.shape[-2:]
        if self.grids[k].shape[2:4] != output.shape[2:4]:
            ys, xs = torch.meshgrid(torch.arange(ny), torch.arange(nx), indexing="ij")
            self.grids[k] = torch.stack((xs, ys), 2).view(1, 1, ny, nx, 2).type_as(output)
        return self.grids[k]  # type: ignore[no-any-return]

    def forward(self, features: tuple[Tensor, Tensor]) -> Tensor:
        outputs = []
        for k, (cls_conv, reg_conv, stride, x) in enumerate(zip(self.cls_convs, self.reg_convs, self.strides, features, strict=True)):
            x = self.stems[k](x)
            scores, boxes = self.cls_preds[k](cls_conv(x)), reg_conv(x)
            reg, obj = self.reg_preds[k](boxes), self.obj_preds[k](boxes)
            if self.training:
                output = torch.cat([reg, obj, scores], 1)
            else:
                output = torch.cat([reg, obj.sigmoid(), scores.sigmoid()], 1)
            n_ch, (hsize, wsize) = 5 + self.num_classes, output.shape[-2:]
            grid = self.grid(output, k).view(1, -1, 2)
            output = output.view(output.shape[0], self.n_anchors, n_ch, hsize, wsize).permute(0, 1, 3, 4, 2)
            output = output.reshape(output.shape[0], self.n_anchors * hsize * wsize, -1)
            xy, wh = (output[..., :2] + grid) * stride, torch.exp(output[..., 2:4]) * stride
            outputs.append(torch.cat([xy, wh, output[..., 4:]], -1))
        return torch.cat(outputs, 1)


class YOLOXLike(nn.Module):
    """Images (batch, 3, height, width) in; (batch, places, 5 + classes) out."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.backbone, self.head = PAFPN(), Head(classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.backbone(x))
        return y


def detection_loss(raw: Tensor, wanted: Tensor) -> Tensor:
    """Generalised IoU of boxes given by their middle and size, (batch, places, 4), and cross-entropy of objectness."""
    a, b = ((x[..., :2] - x[..., 2:4] / 2, x[..., :2] + x[..., 2:4] / 2) for x in (raw, wanted))
    sides = (torch.minimum(a[1], b[1]) - torch.maximum(a[0], b[0])).clamp_min(0)
    overlap, hull = sides.prod(-1), (torch.maximum(a[1], b[1]) - torch.minimum(a[0], b[0])).prod(-1)
    union = raw[..., 2:4].prod(-1) + wanted[..., 2:4].prod(-1) - overlap
    giou = overlap / union - (hull - union) / hull
    return (1 - giou).mean() + F.binary_cross_entropy_with_logits(raw[..., 4], wanted[..., 4])
