"""Modules that hold the user's own: of torch.compile, of data-parallel training and of engines built on it; and what they leave whole."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxprune.errors import InputError, UnsupportedError, kind_of

# Wrapper class -> the attribute that holds what it wraps. By name: asking for most of these classes would import a package.
_HOLDERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "DeepSpeedEngine": "module",
}

_QUANTISED = ("torch.ao.nn.", "torch.ao.quantization.", "torchao.quantization.")
_PACKED = ("torchao.", "bitsandbytes.")
_PARTS = {"DTensor", "FlatParameter"}  # of FSDP and tensor parallelism; DeepSpeed marks its own by ``ds_id``
_WHOLE = "prune before FSDP, tensor parallelism or DeepSpeed shards the model, by the record of one process (fxprune.apply)"
_FIRST = "prune the network first, then prepare or quantise the slim one (prepare_qat, prepare_qat_fx, quantize_)"


def unwrapped(module: nn.Module) -> nn.Module:
    """The user's own module inside wrappers of ``torch.compile``, DDP, FSDP, ``DataParallel`` and DeepSpeed, however they are nested."""
    while True:
        attribute = next((_HOLDERS[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in _HOLDERS), None)
        inner = getattr(module, attribute, None) if attribute is not None else None
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def own_module(given: Any, what: str) -> nn.Module:
    """``unwrapped``, of an argument named ``what``. Raises ``InputError`` where it is no module."""
    if not isinstance(given, nn.Module):
        raise InputError(f"{what} is {kind_of(given)}; pass a torch.nn.Module")
    return unwrapped(given)


def sliceable(model: nn.Module) -> nn.Module:
    """``model``, unless its channels cannot be sliced: it is prepared for quantisation, or quantised (scales and observers are of the
    channels that were there), or this process holds a part of each parameter alone."""
    for path, module in model.named_modules():
        kind = type(module)
        if kind.__module__.startswith(_QUANTISED) and not kind.__module__.endswith(".stubs"):
            raise UnsupportedError(f"{path or 'the model'} is a {kind.__module__}.{kind.__name__}: {_FIRST}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        kind = type(tensor.data)
        if {kind.__name__, type(tensor).__name__} & _PARTS or hasattr(tensor, "ds_id"):
            raise UnsupportedError(f"this process holds a part of {name or 'the parameters'} alone ({type(tensor).__name__}): {_WHOLE}")
        if kind.__module__.startswith(_PACKED) or type(tensor).__module__.startswith(_PACKED) or tensor.is_quantized:
            raise UnsupportedError(f"{name} is a quantised {kind.__name__}: {_FIRST}")
    return model


_INNER = "_orig_mod"
# What runs compiled code, bound to the weights of the user: ``torch.compile(module)`` makes the first ones, ``module.compile()`` the last.
BOUND = frozenset({"dynamo_ctx", "forward", "_forward", "_torchdynamo_orig_callable", "get_compiler_config", "_compiled_call_impl"})


class Uncompiled(nn.Module):
    """In a copy, in the place of what ``torch.compile`` made of a module: it calls that module, whose parameters keep their names."""

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
