"""BatchNorm folded into the convolution before it: one layer fewer to run, for networks that are trained already.

In evaluation mode a BatchNorm is a scale and a shift for every channel, which ``torch.nn.utils.fusion`` puts into the weights.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fxprune.attached import SOURCES
from fxprune.passes.base import GraphPass
from fxprune.passes.ir.slim_module import SlimModule

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class FoldBatchNorm(GraphPass):
    """Fold every BatchNorm that alone reads a convolution. The result has the graph of evaluation and no other."""

    def run(self, module: fx.GraphModule) -> fx.GraphModule:
        if not pairs(module):
            return module
        modes = {name: one.training for name, one in module.named_modules()}
        twin = copy.deepcopy(module).eval()
        graph = twin.graph
        fuse: Any = fuse_conv_bn_eval  # its types name one kind of convolution at a time
        for conv, norm in pairs(twin):
            layer, batch_norm = twin.get_submodule(str(conv.target)), twin.get_submodule(str(norm.target))
            fused = fuse(layer, batch_norm, isinstance(layer, _TRANSPOSED))
            _put(twin, str(conv.target), fused)
            _put(twin, str(norm.target), None)
            norm.replace_all_uses_with(conv)
            graph.erase_node(norm)
        tree = nn.Module()
        tree.__dict__.update({key: value for key, value in twin._state().items() if key != SOURCES})  # type: ignore[operator]
        made = SlimModule(tree, {"eval": graph})
        for name, one in made.named_modules():
            one.training = modes[name]
        return made


def pairs(module: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """Convolution and BatchNorm nodes that can become one: each module called and registered once, no weight of theirs tied."""
    calls = Counter(id(module.get_submodule(str(n.target))) for n in module.graph.nodes if n.op == "call_module")
    places = Counter(id(one) for _, one in module.named_modules(remove_duplicate=False))
    tensors = Counter(id(one) for _, one in module.named_parameters(remove_duplicate=False))

    def single(node: fx.Node) -> bool:
        one = module.get_submodule(str(node.target))
        hooked = one._forward_hooks or one._forward_pre_hooks
        return calls[id(one)] == places[id(one)] == 1 and not hooked and all(tensors[id(p)] == 1 for p in one.parameters(recurse=False))

    found = []
    for norm in module.graph.nodes:
        conv = norm.args[0] if norm.op == "call_module" and norm.args else None
        if not isinstance(conv, fx.Node) or conv.op != "call_module" or len(conv.users) != 1:
            continue
        layer, batch_norm = module.get_submodule(str(conv.target)), module.get_submodule(str(norm.target))
        plain = type(layer) in _CONVOLUTIONS or (type(layer) in _TRANSPOSED and layer.groups == 1)
        if plain and type(batch_norm) in _NORMS and batch_norm.running_mean is not None and single(conv) and single(norm):
            found.append((conv, norm))
    return found


def _put(root: nn.Module, path: str, module: nn.Module | None) -> None:
    owner, _, key = path.rpartition(".")
    held = root.get_submodule(owner)._modules
    if module is None:
        del held[key]
    else:
        held[key] = module
