"""The zoo: every small network by name. Each stands for one way of moving channels that has gone wrong in some tool."""

from __future__ import annotations

from tests.passes import (
    nets_attention,
    nets_calls,
    nets_conv,
    nets_forms,
    nets_more,
    nets_norm,
    nets_parts,
    nets_scripted,
    nets_sequence,
    nets_shape,
    nets_single,
    nets_transformer,
    nets_vision,
    nets_writes,
)
from tests.passes.catalogue import ZOO, Network

__all__ = [
    "ZOO",
    "Network",
    "nets_attention",
    "nets_calls",
    "nets_conv",
    "nets_forms",
    "nets_more",
    "nets_norm",
    "nets_parts",
    "nets_scripted",
    "nets_sequence",
    "nets_shape",
    "nets_single",
    "nets_transformer",
    "nets_vision",
    "nets_writes",
]
