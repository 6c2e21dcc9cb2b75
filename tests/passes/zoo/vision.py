"""Networks as people write them for images, points and sounds; each found something that the engine did not do."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.zoo.catalogue import Body, add, conv_bn, image


class Detect(nn.Module):
    """A YOLO head: it changes the list it is given, makes anchors from shapes and a plain tensor, and trains on other outputs."""

    def __init__(self, channels: tuple[int, ...], bins: int = 4) -> None:
        super().__init__()
        self.strides = torch.tensor([2.0, 4.0])
        self.bins = bins
        self.boxes = nn.ModuleList(nn.Sequential(conv_bn(c, 8), nn.Conv2d(8, 4 * bins, 1)) for c in channels)
        self.classes = nn.ModuleList(nn.Sequential(conv_bn(c, 8), nn.Conv2d(8, 3, 1)) for c in channels)
        self.expect = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)

    def anchors(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        points, strides = [], []
        for x, stride in zip(features, self.strides, strict=True):
            h, w = x.shape[2:]
            y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
            points.append(torch.stack((x, y), -1).view(-1, 2))
            strides.append(torch.full((h * w, 1), stride))
        return torch.cat(points).transpose(0, 1), torch.cat(strides).transpose(0, 1)

    def forward(self, x: list[Tensor]) -> Any:
        for i, (box, cls) in enumerate(zip(self.boxes, self.classes, strict=True)):
            x[i] = torch.cat((box(x[i]), cls(x[i])), 1)
        if self.training:
            return x
        flat = torch.cat([f.view(f.shape[0], 4 * self.bins + 3, -1) for f in x], 2)
        box, cls = flat.split((4 * self.bins, 3), 1)
        b, _, n = box.shape
        box = self.expect(box.view(b, 4, self.bins, n).transpose(2, 1).softmax(1)).view(b, 4, n)
        points, strides = self.anchors(x)
        return torch.cat(((points.unsqueeze(0) + box[:, :2]) * strides, box[:, 2:] * strides, cls.sigmoid()), 1), x


@add("yolo", image(2, 3, 16, 16))
class Yolo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.split, self.inner = conv_bn(3, 8, stride=2), conv_bn(8, 12), conv_bn(6, 6)
        self.merge, self.down, self.head = conv_bn(18, 10), conv_bn(10, 12, stride=2), Detect((10, 12))

    def forward(self, x: Tensor) -> Any:
        parts = list(self.split(self.stem(x)).chunk(2, 1))
        parts.append(self.inner(parts[-1]))
        x = self.merge(torch.cat(parts, 1))
        return self.head([x, self.down(x)])


@add("sequential_slice")
class SequentialSlice(Body):
    """Modules made in ``forward``: a slice of a Sequential, and one without tensors."""

    def build(self) -> None:
        self.layers = nn.Sequential(nn.BatchNorm2d(12), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(12, 10, 3, padding=1), nn.Conv2d(10, 12, 1))

    def mix(self, x: Tensor) -> Any:
        norm, rest = self.layers[0], self.layers[1:]
        return nn.LeakyReLU(0.2)(rest(norm(x) * 1.5))


@add("group_norm_plain", exact=False)
class GroupNormPlain(Body):
    def build(self) -> None:
        self.a, self.norm = nn.Conv2d(12, 16, 3, padding=1), nn.GroupNorm(4, 16, affine=False)
        self.b = nn.Conv2d(16, 12, 1)

    def mix(self, x: Tensor) -> Any:
        return F.group_norm(self.b(self.norm(self.a(x)).relu()), 3)


@add("norm_called_twice", image(2, 6), exact=False)
class NormCalledTwice(nn.Module):
    """A module that keeps sizes but no parameters of them has room for one size only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4), nn.Linear(4, 4)
        self.norm, self.heads = nn.LayerNorm(16, elementwise_affine=False), nn.Unflatten(-1, (4, 4))

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.a(x)).relu()
        y = self.norm(self.b(x)).relu()
        return self.c(y) + self.d(self.heads(x).sum(1) * self.heads(y).sum(1))


class ShuffleUnit(nn.Module):
    """ShuffleNet: joined to its input where it grows, added to it where it does not."""

    def __init__(self, into: int, out: int, groups: int, first: int) -> None:
        super().__init__()
        self.groups, self.grows, inner = groups, out > into, out // 4
        self.squeeze, self.depth = conv_bn(into, inner, 1, groups=first), conv_bn(inner, inner, groups=inner)
        self.expand = nn.Conv2d(inner, out - into if self.grows else out, 1, groups=groups)

    def forward(self, x: Tensor) -> Any:
        y = self.squeeze(x)
        n, c, h, w = y.size()
        y = y.view(n, self.groups, c // self.groups, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)
        y = self.expand(self.depth(y))
        return torch.relu(torch.cat((y, x), 1) if self.grows else x + y)


@add("shuffle_four_groups")
class ShuffleFourGroups(nn.Module):
    """Whole groups look as good as positions at the first grouped convolution, and leave nothing to prune at the next."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv_bn(3, 24), nn.Conv2d(64, 5, 1)
        self.units = nn.Sequential(ShuffleUnit(24, 64, 4, 1), ShuffleUnit(64, 64, 4, 4))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.units(self.stem(x)))


@add("masked_kernel")
class MaskedKernel(Body):
    """PixelCNN: the weight is multiplied with a mask of its own shape; and a kernel that is made of kernels of other widths."""

    mask: Tensor

    def build(self) -> None:
        self.a, self.square, self.point = nn.Conv2d(12, 10, 3, padding=1), nn.Conv2d(10, 12, 3, padding=1), nn.Conv2d(10, 12, 1, bias=False)
        mask = torch.ones_like(self.a.weight)
        mask[:, :, 2:] = 0
        mask[:, :, 1, 1:] = 0
        self.register_buffer("mask", mask)

    def mix(self, x: Tensor) -> Any:
        x = F.relu(F.conv2d(x, self.a.weight * self.mask, self.a.bias, padding=1))
        return F.conv2d(x, self.square.weight + F.pad(self.point.weight, [1, 1, 1, 1]), self.square.bias, padding=1)


@add("standardised_rows", exact=False)
class StandardisedRows(Body):
    """Weight standardisation as it is mostly written: the deviation of the flattened weight."""

    def build(self) -> None:
        self.a, self.b = nn.Conv2d(12, 10, 3, padding=1), nn.Conv2d(10, 12, 1)

    def mix(self, x: Tensor) -> Any:
        w = self.a.weight - self.a.weight.mean(dim=(1, 2, 3), keepdim=True)
        w = w / (w.view(w.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5).expand_as(w)
        return self.b(F.relu(F.conv2d(x, w, self.a.bias, padding=1)))


@add("graph_of_points", image(2, 3, 9))
class GraphOfPoints(nn.Module):
    """DGCNN: neighbours are found by value and gathered from all points of the batch in one row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(6, 10, 1), nn.Conv2d(20, 8, 1)
        self.norm, self.head = nn.BatchNorm2d(10), nn.Linear(16, 4)

    def edges(self, x: Tensor, k: int = 4) -> Tensor:
        b, c, n = x.size()
        square = (x**2).sum(1, keepdim=True)
        nearest = (2 * x.transpose(2, 1) @ x - square - square.transpose(2, 1)).topk(k, dim=-1)[1]
        index = (nearest + torch.arange(0, b, device=x.device).view(-1, 1, 1) * n).view(-1)
        x = x.transpose(2, 1).contiguous()
        around = x.view(b * n, -1)[index, :].view(b, n, k, c)
        x = x.view(b, n, 1, c).repeat(1, 1, k, 1)
        return torch.cat((around - x, x), dim=3).permute(0, 3, 1, 2).contiguous()

    def forward(self, x: Tensor) -> Any:
        x = F.leaky_relu(self.norm(self.first(self.edges(x)))).max(dim=-1)[0]
        x = self.second(self.edges(x)).max(dim=-1)[0]
        return self.head(torch.cat((x.amax(2), x.mean(2)), 1))


@add("regions", lambda: (torch.randn(2, 3, 8, 8), torch.tensor([[0.0, 0, 0, 6, 6], [1, 1, 1, 7, 5], [1, 2, 0, 7, 7]])))
class Regions(nn.Module):
    """The head of a two-stage detector: boxes are cut out of the feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.hidden = conv_bn(3, 10), nn.Linear(10 * 9 * 2, 12)
        self.classes, self.boxes = nn.Linear(12, 4), nn.Linear(12, 16)

    def forward(self, x: Tensor, boxes: Tensor) -> Any:
        import torchvision

        x = self.body(x)
        fine = torchvision.ops.roi_align(x, boxes, (3, 3), sampling_ratio=2, aligned=True)
        coarse = torchvision.ops.roi_pool(x, boxes, (3, 3))
        x = F.relu(self.hidden(torch.cat((fine.flatten(1), coarse.flatten(1)), 1)))
        return self.classes(x), self.boxes(x)


@add("codebook", exact=False)
class Codebook(nn.Module):
    """VQ-VAE: the nearest entry of a table is looked up by a product with one-hot rows, and the network computes a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.table, self.leave = conv_bn(3, 6), nn.Embedding(7, 6), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.enter(x).permute(0, 2, 3, 1).contiguous()
        flat = x.view(-1, 6)
        far = (flat**2).sum(1, keepdim=True) + (self.table.weight**2).sum(1) - 2 * flat @ self.table.weight.t()
        nearest = torch.zeros(flat.shape[0], 7).scatter_(1, far.argmin(1).unsqueeze(1), 1)
        found = (nearest @ self.table.weight).view(x.shape)
        loss = F.mse_loss(found, x.detach()) + F.mse_loss(found.detach(), x)
        return self.leave((x + (found - x).detach()).permute(0, 3, 1, 2)), loss


ACTIVATION = nn.SiLU()


class Scaled(nn.Sequential):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.scale = nn.Parameter(torch.full((), 1.25))

    def forward(self, x: Tensor) -> Any:
        for layer in self:
            x = layer(x) * self.scale
        return x


@add("parts_share")
class PartsShare(nn.Module):
    """The root follows values; its parts share an activation, which is known by the first's name, and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Scaled(nn.Conv2d(3, 10, 3, padding=1), ACTIVATION, nn.Conv2d(10, 8, 1))
        self.second = Scaled(nn.Conv2d(8, 9, 3, padding=1), ACTIVATION, nn.Conv2d(9, 8, 1))
        self.second.scale, self.head = self.first.scale, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        if bool(x.sum() > -1e9):
            x = x * 1.5
        return self.head(self.second(x).mean((2, 3)))


@add("augmented_assignment")
class AugmentedAssignment(Body):
    """``x += y`` writes into the tensor that a list holds already, and not into a number."""

    width = 24

    def build(self) -> None:
        self.a, self.b = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 1)

    def mix(self, x: Tensor) -> Any:
        given, x, count = x, self.a(x), x.shape[1]
        kept = [x]
        count += 4
        x += self.b(given)
        kept.append(x * (count / 16))
        kept[-1] *= 0.5
        kept[-1] -= 0.25
        return torch.cat(kept, 1)


@add("channel_mask")
class ChannelMask(Body):
    """Masks over channels in buffers of booleans."""

    mask: Tensor

    def build(self) -> None:
        self.a = nn.Conv2d(12, 12, 3, padding=1)
        self.register_buffer("mask", torch.arange(12) % 3 != 0)

    def mix(self, x: Tensor) -> Any:
        x = torch.where(self.mask[None, :, None, None], self.a(x), x)
        return x.masked_fill(~self.mask.view(1, -1, 1, 1), 0.5)
