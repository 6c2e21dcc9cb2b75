"""Modules of a network that ``torch.compile`` was applied to: the code that runs is bound to the user's own weights.

A copy would run that code too. Copies of the compiler run the module itself; the names of its parameters stay as they are.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_INNER = "_orig_mod"
# What a module holds that runs compiled code: ``torch.compile(module)`` makes the first ones, ``module.compile()`` the last.
BOUND = frozenset({"dynamo_ctx", "forward", "_forward", "_torchdynamo_orig_callable", "get_compiler_config", "_compiled_call_impl"})


class Uncompiled(nn.Module):
    """In the place of what ``torch.compile`` made of a module: it calls that module."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules[_INNER](*args, **kwargs)  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_modules"][_INNER], name)

    def __len__(self) -> int:
        return len(self._modules[_INNER])  # type: ignore[arg-type]


def is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" and _INNER in module._modules


def class_of_copy(module: nn.Module) -> type[nn.Module]:
    """The class that a copy of ``module`` has."""
    return Uncompiled if is_compiled(module) else type(module)
