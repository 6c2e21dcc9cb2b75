"""What a walk writes down beside the labels themselves: costs, meetings, where parameters were read, what had no rule."""

from __future__ import annotations

from dataclasses import dataclass

from fxprune.passes.labels.values import Vector


@dataclass
class Cost:
    """Multiply-accumulates of one node: ``macs`` on the example, times the kept share along each vector of ``along``."""

    layer: str
    macs: int
    along: tuple[Vector, ...]
    node: str = ""


@dataclass
class Meeting:
    """Labels of two producers were united by a node: an edge of the coupling graph."""

    a: int
    b: int
    op: str
    where: str


@dataclass
class Tie:
    """A parameter's dimension met labels at a node; the coupling graph draws its edges from these."""

    name: str
    dim: int
    node: str
    op: str
