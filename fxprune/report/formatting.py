"""The figures of a finished search, as data and as text: what the tables, the report page and the files show."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One network in the result table: accuracy on the test part as a share, costs per image, median latency in seconds, file size.

    ``untrained`` is the accuracy of the repaired network before it was trained; None where nothing was trained after pruning.
    """

    name: str
    accuracy: float
    macs: int
    params: int
    latency: float
    bytes: int
    untrained: float | None = None


def accuracy_text(accuracy: float | None, row: Row, first: Row, apart: str = " ") -> str:
    """An accuracy of ``row`` in percent and, behind ``apart``, its distance in points from that of the ``first`` row; nothing for None."""
    if accuracy is None:
        return ""
    return f"{100 * accuracy:.2f} %" + ("" if row is first else f"{apart}({100 * (accuracy - first.accuracy):+.2f})")


def count_text(value: float) -> str:
    """A count in thousands, millions or thousand millions."""
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= factor:
            return f"{value / factor:.2f}{unit}"
    return f"{value:.0f}"


def bytes_text(value: float) -> str:
    """Bytes in kB or MB."""
    return f"{value / 1e6:.2f} MB" if value >= 1e6 else f"{value / 1e3:.1f} kB"


def latency_text(seconds: float) -> str:
    """A short time in the unit that suits."""
    return f"{1e6 * seconds:.0f} µs" if seconds < 1e-3 else f"{1e3 * seconds:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def duration_text(seconds: float) -> str:
    """A time that somebody waits, in hours, minutes and seconds."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
