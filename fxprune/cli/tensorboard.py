"""A search's figures for TensorBoard, round by round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fxprune.driver import Progress
from fxprune.imports import needed


def writer_class() -> Any:
    """torch's writer of TensorBoard files. Raises ``DependencyError`` where TensorBoard is not installed."""
    return needed("torch.utils.tensorboard", "--tensorboard", "tensorboard").SummaryWriter


class Scalars:
    """Writes each round's figures to ``folder``: those of the round's best candidate, the best reward so far, and the strategy's own.

    The file is whole after every round. A search that was cut redoes its last round: what it wrote of it before is marked as void.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.writer_class = folder, writer_class()
        self.writer: Any = None
        self.written = 0

    def __call__(self, progress: Progress) -> None:
        if self.writer is None:
            at = progress.rounds if progress.kind == "round" else progress.rounds + 1
            self.writer, self.written = self.writer_class(str(self.folder), purge_step=at), at - 1
        if progress.kind != "round" or progress.rounds <= self.written:
            return
        figures = {**progress.figures, "reward": progress.reward, "share_of_way": progress.share, "evaluations": progress.evaluations}
        if progress.best is not None:
            figures["best_reward"] = progress.best
        for name, value in sorted(figures.items()):
            self.writer.add_scalar(f"search/{name}", value, progress.rounds)
        self.writer.flush()
        self.written = progress.rounds

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
