"""The processes of a training, one or many: Hugging Face accelerate set up and put away again, and each process's share of the batches."""

from __future__ import annotations

import re
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from fxprune.errors import DependencyError, InputError, UnsupportedError, kind_of
from fxprune.evaluation.running import to_device
from fxprune.passes.compat import BatchNormBase, tree_leaves, tree_map

if TYPE_CHECKING:
    from accelerate import Accelerator

PRECISIONS = ("no", "fp16", "bf16")
_REPLICATED = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU")


@contextmanager
def accelerated(
    device: torch.device,
    precision: str | None = None,
    trackers: Sequence[Any] = (),
    log_dir: str | None = None,
    unused_parameters: bool = False,
) -> Iterator[Accelerator]:
    """An ``Accelerator`` for the length of the block, for the processes that ``accelerate launch`` or ``torchrun`` started, or this one.

    ``precision``: "no", "fp16" or "bf16"; None: what the launcher says. Where the caller made no ``Accelerator`` before, accelerate's
    global state is put away afterwards, so that the next training may have another precision or device; the process group stays.
    Raises ``DependencyError`` without accelerate, ``InputError`` for what it cannot do here, ``UnsupportedError`` for sharded parameters.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState, PartialState
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError as error:
        raise DependencyError("training needs accelerate, which is not installed; run: pip install 'fxprune[train]'") from error
    mine = not PartialState._shared_state
    theirs = dict(GradientState._shared_state.get("plugin_kwargs", {}))
    try:
        try:
            accelerator = Accelerator(
                cpu=device.type == "cpu",
                mixed_precision=precision,
                log_with=list(trackers) or None,
                project_dir=log_dir,
                kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused_parameters)],
            )
        except (ValueError, ImportError) as error:
            raise InputError(f"accelerate cannot train so: {' '.join(str(error).split())}") from error
        known = {"all", *(str(made) for made in accelerator.log_with)}
        missing = [name for name in trackers if isinstance(name, str) and name not in known]
        if missing:
            raise DependencyError(f"tracker {missing[0]!r} is not installed; run: pip install {missing[0]}")
        if accelerator.mixed_precision not in PRECISIONS:
            raise UnsupportedError(f"mixed precision {accelerator.mixed_precision!r} is not supported; use one of {', '.join(PRECISIONS)}")
        if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
            raise InputError("mixed precision fp16 needs a GPU; use bf16 on the CPU")
        kind = accelerator.distributed_type.value
        if kind not in _REPLICATED:
            raise UnsupportedError(f"accelerate is set up for {kind}, which shards parameters itself; launch with --multi_gpu or --cpu")
        yield accelerator
    finally:
        if mine:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        else:  # all accelerators share it
            GradientState().plugin_kwargs = theirs


@contextmanager
def batchnorm_as(model: nn.Module, kind: str, accelerator: Accelerator) -> Iterator[None]:
    """For "sync", BatchNorm layers that compute their statistics over all processes in place of the model's own, which come back after."""
    if kind != "sync" or accelerator.num_processes == 1:
        yield
        return
    if accelerator.device.type == "cpu":
        raise InputError('batchnorm="sync" needs GPUs: torch synchronises statistics on them alone; use "local" or "frozen"')
    owned = [(parent, name, child) for parent in model.modules() for name, child in parent._modules.items()]
    before = [(parent, name, child) for parent, name, child in owned if isinstance(child, BatchNormBase)]
    try:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        yield
    finally:
        for parent, name, child in before:  # the two share parameters and buffers
            parent._modules[name] = child


def agreed(value: float, device: torch.device) -> float:
    """The main process's value, on every process: what is decided by it is decided alike."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return value
    said = torch.tensor([value], dtype=torch.float64, device=device)
    torch.distributed.broadcast(said, 0)
    return float(said)


def ungraded(error: Exception, learner: nn.Module) -> str:
    """Names of the parameters that DistributedDataParallel's error knows by number, in brackets; nothing where it tells none."""
    told = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
    learned = [name for name, parameter in learner.named_parameters() if parameter.requires_grad]
    names = [name.removeprefix("student.").removeprefix("model.") for name in learned]
    idle = [names[int(number)] for number in told.group(1).split() if int(number) < len(names)] if told else []
    return f" ({', '.join(idle[:5])}{' ...' if len(idle) > 5 else ''})" if idle else ""


@dataclass(frozen=True)
class Part:
    """One process's share of a batch: ``rows`` of its ``total`` rows. Where there are fewer rows than processes, some share has none:
    it then holds one row all the same, so that every process runs."""

    batch: Any
    rows: int
    total: int


class Shares:
    """Each process's share of a loader's batches, on ``device``.

    The batches are the same however many processes there are: a ``DataLoader`` reads only this process's rows of each, of another
    iterable every process reads all and keeps its own. ``sharded``: the loader gives each process batches of its own, as one with a
    ``DistributedSampler`` or one that accelerate prepared does.
    """

    def __init__(self, loader: Iterable[Any], rank: int, world: int, device: torch.device, sharded: bool = False) -> None:
        self.loader, self.rank, self.world, self.device = loader, rank, world, device
        self.sharded = sharded or _is_sharded(loader)
        self.counts: deque[tuple[int, int, int]] = deque()
        self.own: DataLoader[Any] | None = None
        by_index = isinstance(loader, DataLoader) and loader.batch_sampler is not None and not isinstance(loader.dataset, IterableDataset)
        if world > 1 and not self.sharded and isinstance(loader, DataLoader) and by_index:
            self.own = _with_batches(loader, _RowsOf(loader.batch_sampler, rank, world, self.counts))

    def __iter__(self) -> Iterator[Part]:
        self.counts.clear()
        for number, batch in enumerate(self.own if self.own is not None else self.loader):
            if self.world == 1 or self.sharded:
                part = Part(batch, rows_of(batch), rows_of(batch) * self.world)
            elif self.own is not None:
                rows, total, mark = self.counts.popleft()
                self._check_same(number, mark)
                part = Part(batch, rows, total)
            else:
                total = rows_of(batch)
                self._check_same(number, _mark(batch))
                begin, end = self.rank * total // self.world, (self.rank + 1) * total // self.world
                part = Part(_rows(batch, begin, end) if end > begin else _rows(batch, 0, 1), end - begin, total)
            yield Part(to_device(part.batch, self.device), part.rows, part.total)

    def _check_same(self, number: int, mark: int) -> None:
        """The first batch of an epoch must be the same for all processes, or shares of it make no sense."""
        if number:
            return
        marks = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        torch.distributed.all_gather(marks, torch.tensor([mark], device=self.device))
        if len({int(one) for one in marks}) > 1:
            raise InputError(
                "the loader gives each process other batches; give its generator the same seed everywhere, or set sharded=True "
                "if each process is meant to have its own"
            )


def rows_of(batch: Any) -> int:
    """The rows of a batch: the size of its first tensor's first dimension."""
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return len(leaf)
    raise InputError(f"a batch is {kind_of(batch)} without a tensor; its rows cannot be counted")


def _is_sharded(loader: Any) -> bool:
    from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard

    return isinstance(loader, (DataLoaderShard, DataLoaderDispatcher)) or isinstance(getattr(loader, "sampler", None), DistributedSampler)


def _rows(batch: Any, begin: int, end: int) -> Any:
    total = rows_of(batch)

    def some(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf[begin:end] if leaf.ndim and len(leaf) == total else leaf
        if leaf is None or isinstance(leaf, (bool, int, float)):
            return leaf
        raise InputError(f"a batch holds {kind_of(leaf)}, which cannot be shared out among processes; use a torch DataLoader")

    return tree_map(some, batch)


def _mark(batch: Any) -> int:
    """A number that differs where batches do."""
    first = next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim)
    return zlib.crc32(first.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


class _RowsOf:
    """A batch sampler: this process's indices of each of another's batches; ``counts`` gets how many they are, of how many."""

    def __init__(self, batches: Any, rank: int, world: int, counts: deque[tuple[int, int, int]]) -> None:
        self.batches, self.rank, self.world, self.counts = batches, rank, world, counts

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Any]]:
        for batch in self.batches:
            indices = list(batch)
            begin, end = (rank * len(indices) // self.world for rank in (self.rank, self.rank + 1))
            self.counts.append((end - begin, len(indices), zlib.crc32(repr(indices).encode())))
            yield indices[begin:end] or indices[:1]


def _with_batches(loader: DataLoader[Any], batches: _RowsOf) -> DataLoader[Any]:
    """``loader`` with another batch sampler."""
    names = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator")
    options = {name: getattr(loader, name) for name in (*names, "prefetch_factor", "persistent_workers")}
    return DataLoader(loader.dataset, batch_sampler=batches, **options)  # any iterable of lists will do
