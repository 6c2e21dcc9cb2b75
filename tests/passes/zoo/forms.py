"""Forms of forward: inputs and outputs, in-place writes, control flow, two modes, unused and frozen parameters, foreign operations."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

import fxprune
from tests.passes.zoo.catalogue import Body, add, conv_bn, image, tokens


class Detections(NamedTuple):
    boxes: Tensor
    scores: Tensor


@dataclass
class Segmentation:
    masks: Tensor
    logits: Tensor
    extra: Tensor | None = None


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv_bn(3, 10), nn.Conv2d(10, 4, 1), nn.Conv2d(10, 2, 1)


@add("outputs_tuple")
class OutputsTuple(TwoHeads):
    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        return self.b(x), [self.c(x), self.c(x).mean()]


@add("asserted")
class Asserted(TwoHeads):
    """Checks of values and of sizes on its way."""

    def forward(self, x: Tensor) -> Any:
        assert torch.isfinite(x).all() and x.abs().max() < 1e6, f"not finite: {x.shape}"
        y = self.a(x)
        assert y.dim() == 4 and bool((y >= 0).all())
        return self.b(y), self.c(y)


@add("outputs_dict")
class OutputsDict(TwoHeads):
    def forward(self, x: Tensor) -> Any:
        result: OrderedDict[str, Tensor] = OrderedDict()
        x = self.a(x)
        result["out"] = self.b(x)
        result["aux"] = self.c(x)
        return result


@add("outputs_named_tuple")
class OutputsNamedTuple(TwoHeads):
    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        return Detections(self.b(x), scores=self.c(x))


@add("outputs_dataclass")
class OutputsDataclass(TwoHeads):
    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        return Segmentation(masks=self.b(x), logits=self.c(x).mean((2, 3)))


@add("outputs_features")
class OutputsFeatures(nn.Module):
    """An intermediate is returned too: its channels stay, the others do not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv_bn(3, 8), conv_bn(8, 9), conv_bn(9, 7), nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor) -> Any:
        first = self.b(self.a(x))
        return {"features": first, "out": self.d(self.c(first))}


@add("inputs_two", lambda: (torch.randn(2, 3, 8, 8), torch.randn(2, 6)))
class InputsTwo(nn.Module):
    """An image and a vector that modulates its channels (FiLM)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.film, self.b = conv_bn(3, 10), nn.Linear(6, 20), nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Any:
        gamma, beta = self.film(condition).chunk(2, dim=1)
        return self.b(gamma[:, :, None, None] * self.a(x) + beta[:, :, None, None])


@add("inputs_keywords", lambda: {"x": torch.randn(2, 3, 8, 8), "scale": torch.rand(2, 1, 1, 1)})
class InputsKeywords(TwoHeads):
    def forward(self, x: Tensor, shift: Tensor | None = None, *, scale: Tensor | None = None) -> Any:
        x = self.a(x)
        x = x if shift is None else x + shift
        return self.b(x if scale is None else x * scale)


@add("inputs_nested", lambda: ({"image": torch.randn(2, 3, 8, 8), "pair": [torch.randn(2, 1, 1, 1), torch.randn(2, 1, 8, 8)]},))
class InputsNested(TwoHeads):
    def forward(self, batch: dict[str, Any]) -> Any:
        x = self.a(batch["image"])
        return self.b(x * batch["pair"][1]), self.c(x + batch["pair"][0])


@add("inputs_float_flag", lambda: (torch.randn(2, 3, 8, 8), 0.5, True))
class InputsNumbers(TwoHeads):
    def forward(self, x: Tensor, gain: float, doubled: bool) -> Any:
        x = self.a(x) * gain
        return self.b(x * 2 if doubled else x)


@add("in_place")
class InPlace(Body):
    def build(self) -> None:
        self.a, self.act = nn.Conv2d(12, 12, 3, padding=1), nn.LeakyReLU(0.1, inplace=True)

    def mix(self, x: Tensor) -> Any:
        y = self.act(self.a(x)) * 1.5
        y += x
        y.mul_(0.5).add_(x, alpha=2)
        F.relu_(y)
        z = y.clone()
        z[:] = y * 2
        return z


@add("control_flow_on_shapes")
class ControlFlow(Body):
    def build(self) -> None:
        self.a, self.b = conv_bn(12, 12), conv_bn(12, 12, 1)

    def mix(self, x: Tensor) -> Any:
        if x.shape[1] != 12 or x.dim() != 4:
            raise ValueError("12 channels are wanted")
        for _ in range(x.shape[2] // 4):
            x = self.a(x) if x.size(-1) > 4 else self.b(x)
            x = F.avg_pool2d(x, 2)
        assert x.shape[-1] == 2
        return x.contiguous() if isinstance(x, Tensor) else x


@add("pad_to_multiple", image(2, 3, 9, 7))
class PadToMultiple(Body):
    def mix(self, x: Tensor) -> Any:
        h, w = x.shape[-2:]
        x = F.pad(x, (0, (4 - w % 4) % 4, 0, (4 - h % 4) % 4))
        return F.avg_pool2d(x, 4)


@add("functional_dropout")
class FunctionalDropout(Body):
    def build(self) -> None:
        self.a = conv_bn(12, 12)

    def mix(self, x: Tensor) -> Any:
        return F.dropout(self.a(x), 0.4, self.training) + F.dropout2d(x, training=self.training)


@add("stochastic_depth")
class StochasticDepth(Body):
    """Row-wise stochastic depth twice: as torchvision has it and written out as timm has it."""

    def build(self) -> None:
        self.a, self.b = conv_bn(12, 12), conv_bn(12, 12)

    def mix(self, x: Tensor) -> Any:
        x = x + stochastic_depth(self.a(x), 0.3, "row", self.training)
        y = self.b(x)
        if self.training:
            keep = y.new_empty((y.shape[0],) + (1,) * (y.ndim - 1)).bernoulli_(0.7)
            y = y * keep.div_(0.7)
        return x + y


@add("auxiliary_head")
class AuxiliaryHead(nn.Module):
    """In training it returns a second head's logits too, whose layers evaluation never reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv_bn(3, 10), conv_bn(10, 12), nn.Linear(12, 4)
        self.aux, self.aux_head = conv_bn(10, 7, 1), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        out = self.head(self.b(x).mean((2, 3)))
        if self.training:
            return out, self.aux_head(self.aux(x).mean((2, 3)))
        return out


@add("unused_parameters")
class Unused(Body):
    def build(self) -> None:
        self.a, self.forgotten, self.never = conv_bn(12, 12), nn.Conv2d(12, 9, 3), nn.Parameter(torch.zeros(7))

    def mix(self, x: Tensor) -> Any:
        return self.a(x)


@add("frozen_parameters")
class Frozen(Body):
    def build(self) -> None:
        self.a = conv_bn(12, 12)
        for p in (*self.stem.parameters(), *self.a.parameters()):
            p.requires_grad_(False)

    def mix(self, x: Tensor) -> Any:
        return self.a(x)


@add("no_grad_block")
class NoGradBlock(Body):
    def build(self) -> None:
        self.a = conv_bn(12, 12)

    def mix(self, x: Tensor) -> Any:
        return self.a(x).detach() + x


@torch.fx.wrap
def mystery(x: Tensor) -> Tensor:
    """Sorts each position's channels: no rule can know that, and tracing into it finds data-dependent code."""
    return x if bool((x.sum() > 1e9).item()) else x.sort(dim=1).values


@add("unknown_operation")
class UnknownOperation(Body):
    def build(self) -> None:
        self.a, self.b = nn.Conv2d(12, 10, 1), nn.Conv2d(10, 12, 1)

    def mix(self, x: Tensor) -> Any:
        return self.b(mystery(self.a(x)))


def swish_twice(x: Tensor, y: Tensor) -> Tensor:
    """Element-wise, but written so that tracing stops: ``float`` of a value."""
    return torch.sigmoid(x) * y * (1.0 if float(x.detach().sum()) < 1e9 else 0.0)


torch.fx.wrap("swish_twice")


@fxprune.register_op(swish_twice)
def swish_twice_rule(ctx: Any, node: Any, x: Any, y: Any) -> Any:
    return ctx.pointwise(node, x, y, zero="none")


@add("registered_operation")
class RegisteredOperation(Body):
    def build(self) -> None:
        self.a, self.b = nn.Conv2d(12, 10, 1), nn.Conv2d(12, 10, 1)
        self.c = nn.Conv2d(10, 12, 1)

    def mix(self, x: Tensor) -> Any:
        return self.c(swish_twice(self.a(x), self.b(x)))


class ValueDependent(nn.Module):
    """Cannot be traced: it branches on a tensor's values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Any:
        return self.inner(x) if bool(x.abs().sum() > 0) else x


@add("untraceable_child", tokens())
class UntraceableChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.child, self.c, self.d = nn.Linear(12, 10), nn.Linear(10, 9), ValueDependent(), nn.Linear(9, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        return self.d(F.relu(self.c(self.child(F.relu(self.b(F.relu(self.a(x))))))))


@add("shared_submodule_names")
class SharedSubmodule(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 8), nn.Conv2d(8, 8, 3, padding=1)
        self.again, self.out = self.b, nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.b(self.a(x)))
        return self.out(F.relu(self.again(x)))


@add("half_precision_island", image())
class Island(Body):
    def build(self) -> None:
        self.a = nn.Conv2d(12, 10, 1)
        self.b = nn.Conv2d(10, 12, 1)

    def mix(self, x: Tensor) -> Any:
        y = self.a(x).double()
        return self.b((y * 2).to(x.dtype)).type_as(x)


@add("single_layer", locked=True)
class SingleLayer(nn.Module):
    """Nothing to prune: input and output are the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.a(x)
