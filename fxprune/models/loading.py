"""Networks and factories by their spec: ``torchvision:NAME``, ``timm:NAME``, ``package.module:factory``, and weight files."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fxprune.errors import FileError, InputError, few, first_line, kind_of
from fxprune.imports import by_path, call_factory, needed, unknown_name


def load_model(spec: str, *, num_classes: int | None = None, weights: str | os.PathLike[str] | None = None) -> nn.Module:
    """Build the network that ``spec`` names, with random weights or those of the file ``weights``.

    ``num_classes``: size of the classifier; left out, it is the builder's default. It is handed to a factory only if the factory
    takes an argument of that name. Raises ``InputError`` for a spec that names nothing, ``FileError`` for weights that do not fit.
    """
    kind, _, name = spec.partition(":")
    if not kind or not name:
        raise InputError(f"model {spec!r} is not of the form torchvision:NAME, timm:NAME or package.module:factory")
    if kind == "torchvision":
        model = _torchvision(name, num_classes)
    elif kind == "timm":
        model = _timm(name, num_classes)
    else:
        model = _from_factory(spec, num_classes)
    if weights is not None:
        load_weights(model, weights)
    return model


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a state_dict from a .safetensors file, or from a .pt or .pth file that holds nothing but tensors, into ``model``."""
    state = _read_state(Path(path))
    own = model.state_dict()
    # Files from before BatchNorm counted its batches lack the counter, and load_state_dict does without it.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    differing = [k for k in own if k in state and state[k].shape != own[k].shape]
    shapes = [f"{k} is {_shape(state[k])} in the file, {_shape(own[k])} in the model" for k in differing]
    if missing or unexpected or shapes:
        told = [f"missing {few(missing)}"] * bool(missing) + [f"unknown {few(unexpected)}"] * bool(unexpected) + shapes[:1]
        hint = "; if only the classifier differs, the number of classes does" if shapes and not (missing or unexpected) else ""
        raise FileError(f"the weights in {path} do not fit the model: {'; '.join(told)}{hint}")
    model.load_state_dict(state, strict=False)


def _torchvision(name: str, num_classes: int | None) -> nn.Module:
    models = needed("torchvision.models", f"model 'torchvision:{name}'", "vision")

    known = models.list_models()
    if name not in known:
        raise unknown_name("torchvision model", name, known)
    with warnings.catch_warnings():
        # GoogLeNet and Inception announce that their initialisation will change.
        warnings.simplefilter("ignore", FutureWarning)
        return _built(f"torchvision:{name}", lambda **options: models.get_model(name, weights=None, **options), num_classes)


def _timm(name: str, num_classes: int | None) -> nn.Module:
    timm = needed("timm", f"model 'timm:{name}'", "timm")
    if not timm.is_model(name):
        raise unknown_name("timm model", name, timm.list_models())
    return _built(f"timm:{name}", lambda **options: timm.create_model(name, pretrained=False, **options), num_classes)


def _from_factory(spec: str, num_classes: int | None) -> nn.Module:
    factory = by_path(spec, "model")
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise InputError(f"model {spec!r} is {kind_of(factory)}; it must be a function or class that gives a torch.nn.Module")
    return _built(spec, factory, num_classes)


def _built(spec: str, factory: Callable[..., Any], num_classes: int | None) -> nn.Module:
    model = call_factory(spec, "model", factory, num_classes=num_classes)
    if not isinstance(model, nn.Module):
        raise InputError(f"model {spec!r} gave {kind_of(model)}; it must give a torch.nn.Module")
    return model


def _read_state(path: Path) -> Mapping[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise FileError(f"cannot read the weights {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise FileError(f"the weights {path} are not a whole safetensors file: {first_line(error)}") from error
    except pickle.UnpicklingError as error:
        raise FileError(f"the weights {path} hold more than tensors; save model.state_dict(), best as safetensors") from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise FileError(f"the weights {path} are not a whole PyTorch file: {first_line(error)}") from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise FileError(f"the weights {path} are not a state_dict: names with tensors; save model.state_dict()")
    return {str(k).removeprefix("module."): v for k, v in found.items()}  # DataParallel puts "module." in front


def _shape(tensor: Tensor) -> str:
    return "x".join(str(s) for s in tensor.shape) or "a scalar"
