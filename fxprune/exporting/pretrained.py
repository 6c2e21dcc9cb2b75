"""A folder that ``from_pretrained`` of transformers loads: the slim weights, and a configuration of the model's own family that gives them.

Which numbers of a configuration give which sizes is not written down per family: it is found by building the model on the meta device with
one number changed at a time. What is found is proved by loading the folder and comparing outputs.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import itertools
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxprune.errors import FAULTS, ExportError, InputError, few, first_line, kind_of
from fxprune.imports import needed
from fxprune.passes.rewriting.attributes import names_of_class

Shapes = dict[str, tuple[int, ...]]
Keys = tuple[Any, ...]
Agrees = Callable[[nn.Module], float]
_MOST = 512  # configurations that are built before the search is given up; each is a matter of milliseconds to a second
# Numbers that give no widths, or that a policy does not touch.
_LEFT = frozenset(
    {"vocab_size", "max_position_embeddings", "n_positions", "n_ctx", "num_labels", "image_size", "patch_size", "num_channels"}
)
_ALIKE = 8  # configurations of the same sizes that are tried
_WIDTH = re.compile(r"inner|dim|size|width|heads|rank")
_NUMBER = re.compile(r"\.\d+\.")
_DEPTH = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers", "depths")


def own_model(slim: nn.Module) -> Any:
    """``slim`` as a model of transformers. Raises ``InputError`` for others."""
    transformers = needed("transformers", "export to transformers", "transformers")
    if not isinstance(slim, transformers.PreTrainedModel):
        raise InputError(
            f'format="transformers" writes models of transformers, and this is {kind_of(slim)}; '
            "pass what compress(model, ..., keep_class=True) returned"
        )
    return slim


def write_pretrained(slim: Any, folder: Path, agrees: Agrees, tolerance: float) -> float:
    """Save ``slim`` with a configuration that fits it: the first whose model's relative difference ``agrees`` up to ``tolerance``.

    Returns the difference. Raises ``ExportError`` where no configuration has the sizes, or none that has them computes the same.
    """
    least = float("inf")
    with quiet():
        configs, refused = fitting(slim)
        for config in configs:
            made = type(slim)(config).to(next(slim.parameters()).dtype)
            made.load_state_dict(slim.state_dict())
            made.tie_weights()
            difference = agrees(made.eval())
            if difference <= tolerance:
                if getattr(slim, "generation_config", None) is not None:
                    made.generation_config = copy.deepcopy(slim.generation_config)
                made.save_pretrained(folder)
                return difference
            least = min(least, difference)
    why = (
        f"the one that fits is refused ({refused})" if refused else "the class computes a number of a size that went (a scale, frequencies)"
    )
    raise ExportError(
        f"cannot export to transformers: a {type(slim.config).__name__} of these sizes gives other outputs, by {least:.1e} of the largest: "
        f'{why}; prune with attention="heads" to another number, or leave that size whole'
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and warnings of transformers, whose settings are put back."""
    logging = importlib.import_module("transformers.utils.logging")
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def fitting(slim: Any) -> tuple[list[Any], str]:
    """The configurations that give a model with the sizes of ``slim``, those first whose modules hold the same integers.

    Several may: as many heads, or the same width in fewer. The text says why the likeliest was refused, if it was.
    Raises ``ExportError`` where there is none.
    """
    target = _shapes(slim)
    base, start = _explicit(slim)
    before = _shapes(start)
    if set(before) != set(target):
        raise ExportError(f"cannot export to transformers: {sorted(set(before) ^ set(target))[0]} is in one of slim model and class only")
    if before == target:
        return [base], ""
    effects = _effects(slim, base, start, target)
    nearest: tuple[int, Any] | None = None
    refused: str | None = None
    found: list[tuple[int, Any]] = []
    for values in itertools.islice(_combinations(base, effects, before, target), _MOST):
        config = _changed(base, values)
        made = _built(slim, config)
        if refused is None:
            refused = made if isinstance(made, str) else ""
        if isinstance(made, str):
            continue
        shapes = _shapes(made)
        wrong = sum(shapes.get(name) != shape for name, shape in target.items())
        if not wrong:
            found.append((_other_numbers(slim, made), config))
            if not found[-1][0] or len(found) == _ALIKE:
                break
        if nearest is None or wrong < nearest[0]:
            nearest = wrong, config
    if found:
        return [config for _, config in sorted(found, key=lambda one: one[0])], refused or ""
    layered = _per_layer(slim, base if nearest is None else nearest[1], effects, target)
    if not isinstance(layered, str):
        return [layered], ""
    raise ExportError(_reason(slim, nearest, before, target, effects, layered))


def _explicit(slim: Any) -> tuple[Any, nn.Module]:
    """The original's configuration, with every width said that the class computes from others where it is None; and its model."""
    config = copy.deepcopy(slim.config)
    made = _built(slim, config)
    if isinstance(made, str):
        raise ExportError(f"cannot export to transformers: {type(slim).__name__} cannot be built from its configuration: {made}")
    before = _shapes(made)
    sizes = sorted({size for shape in before.values() for size in shape} | {v for _, v in _numbers(config)})
    unsaid = {key for key, value in vars(config).items() if value is None and _WIDTH.search(key)}
    if not hasattr(config, "head_dim"):  # many classes read it where their configuration does not have it
        unsaid.add("head_dim")
    for key in sorted(unsaid):
        if key == "head_dim" or getattr(config, key) is None:
            for size in sizes:
                other = _changed(config, {(key,): size})
                trial = _built(slim, other)
                if not isinstance(trial, str) and _shapes(trial) == before and not _other_numbers(made, trial):
                    larger = _built(slim, _changed(config, {(key,): 2 * size}))
                    if isinstance(larger, str) or _shapes(larger) != before:  # it is read at all
                        config = other
                        break
    return config, made


def _built(slim: Any, config: Any) -> Any:
    """The model of ``config`` on the meta device, or why it cannot be built."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = copy.deepcopy(config)
            if hasattr(made, "validate"):
                made.validate()
            return type(slim)(made)
    except (*FAULTS, importlib.import_module("huggingface_hub.errors").StrictDataclassError) as error:
        return first_line(error.__cause__ or error)


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def _other_numbers(slim: nn.Module, made: nn.Module) -> int:
    """How many integers modules hold that differ, of those that their code reads."""
    theirs = dict(made.named_modules())
    count = 0
    for name, module in slim.named_modules():
        kind: Any = type(module)
        read, held = names_of_class(kind), theirs[name].__dict__ if name in theirs else {}
        for key, value in module.__dict__.items():
            if key in read and type(value) is int and type(held.get(key, value)) is int and held.get(key, value) != value:
                count += 1
    return count


def _numbers(config: Any) -> Iterator[tuple[Keys, int]]:
    for key, value in sorted(vars(config).items()):
        if key.startswith("_") or key in _LEFT or key in _DEPTH or key.endswith("_token_id"):
            continue
        if type(value) is int and value > 1:
            yield (key,), value
        elif isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
            yield from (((key, i), v) for i, v in enumerate(value))


def _changed(config: Any, values: Mapping[Keys, int]) -> Any:
    made = copy.deepcopy(config)
    for keys, value in values.items():
        if len(keys) == 1:
            setattr(made, keys[0], value)
        else:
            held = list(getattr(made, keys[0]))
            held[keys[1]] = value
            setattr(made, keys[0], held)
    return made


def _effects(slim: Any, base: Any, start: nn.Module, target: Shapes) -> dict[Keys, set[tuple[str, int]]]:
    """For each number of the configuration that a model depends on, the dimensions that it sizes."""
    before = _shapes(start)
    found: dict[Keys, set[tuple[str, int]]] = {}
    for keys, value in _numbers(base):
        for other in (2 * value, value // 2 if value % 2 == 0 else 3 * value):
            made = _built(slim, _changed(base, {keys: other}))
            if isinstance(made, str):
                continue
            shapes = _shapes(made)
            dims = {
                (name, d)
                for name, shape in before.items()
                if len(shapes.get(name, ())) == len(shape)
                for d, size in enumerate(shape)
                if shapes[name][d] != size
            }
            missing = {name for name in before if name not in shapes} | (set(shapes) - set(before))
            if dims or missing or _other_numbers(start, made):  # as many heads change no size
                found[keys] = dims
            break
        else:
            # It cannot be changed alone; what it sizes is guessed from the value itself.
            found[keys] = {(n, d) for n, s in before.items() for d, size in enumerate(s) if size == value and target[n][d] != size}
    return found


def _combinations(base: Any, effects: Mapping[Keys, set[tuple[str, int]]], before: Shapes, target: Shapes) -> Iterator[dict[Keys, int]]:
    """Values for the numbers, those that most sizes speak for first."""
    current = dict(_numbers(base))
    options: list[list[tuple[Keys, int]]] = []
    for keys, dims in effects.items():
        votes: dict[int, float] = defaultdict(float)
        votes[current[keys]] += 0.5
        for name, d in dims:
            new = current[keys] * target[name][d]
            if new % before[name][d] == 0 and new:
                alone = sum((name, d) in other for other in effects.values()) == 1
                votes[new // before[name][d]] += 100 if alone else 1
        if not dims:
            for new, old in sorted({(target[n][d], size) for n, shape in before.items() for d, size in enumerate(shape)}):
                if current[keys] * new % old == 0 and current[keys] * new // old:
                    votes[current[keys] * new // old] += 0.1
        ranked = sorted(votes, key=lambda value: (-votes[value], value))[:4]
        options.append([(keys, value) for value in ranked])
    tried = sorted(itertools.islice(itertools.product(*(range(len(o)) for o in options)), 4 * _MOST), key=sum)
    for places in tried:
        yield dict(option[place] for option, place in zip(options, places, strict=True))


def _per_layer(slim: Any, base: Any, effects: Mapping[Keys, set[tuple[str, int]]], target: Shapes) -> Any:
    """A configuration with numbers of single layers (transformers' ``per_layer_config``) beside those of ``base``, or why there is none."""
    kind = type(slim).__name__
    if not hasattr(type(base), "per_layer_config"):
        return "this version of transformers has no per-layer configurations"
    start = _built(slim, base)
    if isinstance(start, str):
        return "no layer's number explains the sizes"
    before, current = _shapes(start), dict(_numbers(base))
    layers: dict[int, dict[str, int]] = {}
    known: dict[Any, dict[str, int]] = {}
    for index in sorted({layer for name, shape in before.items() if target[name] != shape and (layer := _layer(name)) is not None}):
        mine = {name for name in before if _layer(name) == index}
        form = tuple((_NUMBER.sub(".N.", name), target[name]) for name in sorted(mine))
        if form not in known:
            local = {keys: {(n, d) for n, d in dims if n in mine} for keys, dims in effects.items() if len(keys) == 1}
            local = {k: dims for k, dims in local.items() if any(target[n][d] != before[n][d] for n, d in dims)}
            found: tuple[int, dict[str, int]] | None = None
            for values in itertools.islice(_combinations(base, local, before, target), _ALIKE * _ALIKE):
                changed = {keys[0]: value for keys, value in values.items() if value != current[keys]}
                made = _built(slim, _with_layers(base, {index: changed})) if changed else "nothing changes"
                shapes = {} if isinstance(made, str) else _shapes(made)
                if not isinstance(made, str) and all(shapes.get(name) == target[name] for name in mine):
                    wrong = _other_numbers(slim, made)
                    if found is None or wrong < found[0]:
                        found = wrong, changed
            if found is None:
                return f"{kind} reads no number of a single layer that explains the sizes of layer {index}"
            known[form] = found[1]
        layers[index] = known[form]
    config = _with_layers(base, layers)
    made = _built(slim, config) if layers else "no layer"
    return config if not isinstance(made, str) and _shapes(made) == target else f"{kind} reads no numbers of single layers"


def _layer(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _with_layers(base: Any, layers: Mapping[int, Mapping[str, int]]) -> Any:
    """``base`` with numbers of single layers. One that the class does not know makes the model that is built of it fail."""
    config = copy.deepcopy(base)
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        config.per_layer_config = {index: dict(values) for index, values in layers.items()}
    return config


def _reason(slim: Any, nearest: Any, before: Shapes, target: Shapes, effects: Mapping[Keys, set[tuple[str, int]]], layered: Any) -> str:
    config = type(slim.config).__name__
    for keys, dims in effects.items():
        roles: dict[tuple[str, int], dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
        originals: dict[tuple[str, int], set[int]] = defaultdict(set)
        for name, d in sorted(dims):
            if before[name][d] != 1:
                originals[_NUMBER.sub(".N.", name), d].add(before[name][d])
                roles[_NUMBER.sub(".N.", name), d][target[name][d]].append(name.rpartition(".")[0])
        uneven = next((sizes for role, sizes in roles.items() if len(sizes) > 1 and len(originals[role]) == 1), None)
        if uneven is not None:
            says = ", ".join(f"{size} in {few(names)}" for size, names in sorted(uneven.items()))
            return (
                f"cannot export to transformers: {config}.{keys[0]} is one number for all layers, and there are {says}; {layered}; "
                "one sparsity for the groups of these layers fits"
            )
    made = "" if nearest is None else _built(slim, nearest[1])
    if isinstance(made, str):
        return f"cannot export to transformers: no {config} with the slim sizes could be built{': ' + made if made else ''}"
    name = next(name for name, shape in _shapes(made).items() if target.get(name) != shape)
    d = next(i for i, (a, b) in enumerate(zip(_shapes(made)[name], target[name], strict=True)) if a != b)
    keys = next((keys for keys, dims in effects.items() if (name, d) in dims), ("?",))
    return (
        f"cannot export to transformers: {type(slim).__name__} sizes {name} by {config}.{keys[0]}, with others that keep other shares "
        f"than the {target[name][d]} of {before[name][d]} here; leave {name.rpartition('.')[0]} whole, or give all that it is tied to "
        "one sparsity"
    )
