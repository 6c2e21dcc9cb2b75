"""Notes on numbers that code asks sizes for; those that a function of torch asks for to check its arguments are taken back."""

from __future__ import annotations

import sys
from types import CodeType, FrameType

from torch import fx

from fxprune.passes.ir.notes import Note

_OWN = frozenset(f"fxprune.passes.{name}" for name in ("tracing.sizes.specialisation", "tracing.proxies", "tracing.tracer"))


class Asked:
    """Adds to ``notes`` while a network is traced.

    ``range(n)`` and ``torch.fft.fft(x, n=n)`` both ask the proxy ``n`` for its number. The first has nothing else from there on; the
    second is then recorded with the proxy itself, so that the graph follows the size. The instruction tells which call asked; where a
    graph is traced anew one instruction makes all calls, and ``source``, its node, tells them apart.
    """

    def __init__(self, notes: dict[Note, None]) -> None:
        self._notes = notes
        self._call: tuple[CodeType, int, fx.Node | None] | None = None
        self._added: list[Note] = []

    def add(self, note: Note, source: fx.Node | None) -> None:
        """A number was asked for."""
        call = (*_instruction(), source)
        if call != self._call:
            self._call, self._added = call, []
        if note not in self._notes:
            self._notes[note] = None
            self._added.append(note)

    def recorded(self, source: fx.Node | None) -> None:
        """A function of torch was called with proxies: what the same call has asked for is no loss."""
        if self._call is not None and self._call == (*_instruction(), source):
            for note in self._added:
                del self._notes[note]
        self._call, self._added = None, []


def _instruction() -> tuple[CodeType, int]:
    """The instruction, outside of the tracer and its proxies, that is at work."""
    frame: FrameType = sys._getframe(1)
    while frame.f_globals.get("__name__") in _OWN and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code, frame.f_lasti
