"""What TensorBoard reads back: one value a round, each round once, also after a run was cut."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fxprune.cli.options import Options
from fxprune.cli.session import begin
from fxprune.cli.tensorboard import Scalars
from fxprune.driver import Progress, SearchConfig, run
from fxprune.errors import DependencyError
from fxprune.testing.synthetic import Chain

tensorboard = pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # TensorBoard's own


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: Any = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def searched(folder: Path, scalars: Path, cut: int | None = None) -> None:
    """Search, and stop in the middle of what is told after round ``cut``, before the checkpoint of that round."""
    writer = Scalars(scalars)

    def told(progress: Progress) -> None:
        writer(progress)
        if progress.kind == "round" and progress.rounds == cut:
            raise KeyboardInterrupt

    config = SearchConfig(targets="macs=0.7,0.5", samples=3, rounds=4, steps=2, epsilon=0.5, epsilon_share=1.0)
    try:
        run(Chain().problem(), config, checkpoint_dir=folder, on_event=told, resume=folder.exists())
    finally:
        writer.close()


def test_every_round_once_whole_or_cut_and_resumed(tmp_path: Path) -> None:
    searched(tmp_path / "one", tmp_path / "whole")
    for cut in (2, 7, 12):
        with pytest.raises(KeyboardInterrupt):
            searched(tmp_path / "other", tmp_path / "cut", cut)
    searched(tmp_path / "other", tmp_path / "cut")
    whole, again = read(tmp_path / "whole"), read(tmp_path / "cut")
    assert whole == again
    names = ("reward", "best_reward", "accuracy", "macs", "params", "sparsity", "epsilon", "policy_entropy", "share_of_way")
    assert {f"search/{name}" for name in names} <= whole.keys()
    steps = [step for step, _ in whole["search/reward"]]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 12
    assert whole["search/macs"][-1][1] == pytest.approx(0.5, rel=0.01)
    assert whole["search/epsilon"][0][1] == pytest.approx(0.5)


def test_without_tensorboard_it_says_what_to_install_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(DependencyError, match=r"pip install 'fxprune\[tensorboard\]'"):
        begin(Options(out=str(tmp_path / "out"), tensorboard=True), "fxprune-search --tensorboard")
    assert not (tmp_path / "out").exists()
