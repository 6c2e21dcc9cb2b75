"""Modules that hold the user's own: of torch.compile, of data-parallel training and of engines built on it."""

from __future__ import annotations

from torch import nn

# Wrapper class -> the attribute that holds what it wraps. By name: asking for most of these classes would import a package.
_HOLDERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "DeepSpeedEngine": "module",
}


def unwrapped(module: nn.Module) -> nn.Module:
    """The user's own module inside wrappers of ``torch.compile``, DDP, FSDP, ``DataParallel`` and DeepSpeed, however they are nested."""
    while True:
        attribute = next((_HOLDERS[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in _HOLDERS), None)
        inner = getattr(module, attribute, None) if attribute is not None else None
        if not isinstance(inner, nn.Module):
            return module
        module = inner
