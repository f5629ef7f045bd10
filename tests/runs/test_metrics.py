from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from training_runs import config

from cache_pipeline.errors import CheckpointError, MissingExtraError
from cache_pipeline.runs.metrics import CSV_NAME, TENSORBOARD, MetricsLog, read_metrics
from cache_pipeline.training.train import train


class FakeWandb(SimpleNamespace):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__(asked={}, rows=[], finished=False)

    def init(self, **options: Any) -> FakeWandb:
        self.asked = options
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.rows.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_wandb_gets_every_row_and_the_config_of_the_run(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train(config(tmp_path / "run", cache, steps=2, wandb="lift"), progress=False)
    assert fake.asked["project"] == "lift"
    assert fake.asked["name"] == "run"
    assert fake.asked["config"]["kind"] == "train"
    assert [step for step, values in fake.rows if "training/loss" in values] == [1, 2]
    assert fake.finished


def test_without_its_client_wandb_is_refused_before_any_work(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"uv sync --extra wandb"):
        train(config(tmp_path / "run", cache, wandb="lift"), progress=False)
    assert not (tmp_path / "run").exists()


def logged(run: Path, steps: list[int], *, value: float) -> None:
    with MetricsLog(run, 0) as log:
        for step in steps:
            log.write(step, {"training/loss": value})


def curve(run: Path) -> dict[int, float]:
    return {row["step"]: row["training/loss"] for row in read_metrics(run)}


def test_a_resumed_run_never_loses_a_row_however_soon_it_is_killed(tmp_path: Path) -> None:
    logged(tmp_path, [1, 2, 3, 4, 5], value=1)
    with MetricsLog(tmp_path, 3) as log:  # the file is what a kill would leave, at any of these lines
        assert curve(tmp_path) == dict.fromkeys([1, 2, 3, 4, 5], 1.0)
        log.write(4, {"training/loss": 2})
        assert curve(tmp_path) == {1: 1, 2: 1, 3: 1, 4: 2, 5: 1}
        log.write(5, {"training/loss": 2})
        log.write(6, {"training/loss": 2})
        assert curve(tmp_path) == {1: 1, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2}
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_row_that_was_cut_off_is_left_out_and_the_next_one_begins_a_line(tmp_path: Path) -> None:
    logged(tmp_path, [1, 20], value=1)
    with (tmp_path / CSV_NAME).open("a") as file:
        file.write("30,0.1")
    assert curve(tmp_path) == {1: 1, 20: 1}
    with MetricsLog(tmp_path, 20) as log:
        log.write(30, {"training/loss": 2})
    assert curve(tmp_path) == {1: 1, 20: 1, 30: 2}


def test_a_metrics_file_that_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / CSV_NAME).write_text("step,training/loss\nfirst,good\n")
    with pytest.raises(CheckpointError, match=r"metrics\.csv is damaged"):
        read_metrics(tmp_path)


def test_a_full_disk_while_logging_is_one_line(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, 0) as log:
        log._file.close()
        log._file = Path("/dev/full").open("a")  # noqa: SIM115
        with pytest.raises(CheckpointError, match=r"no space left .* --resume"):
            log.write(1, {"training/loss": 1})


def test_tensorboard_reads_what_was_written_before_and_after_the_run_was_moved(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "hidden").mkdir()
    with MetricsLog(tmp_path / "hidden", 0) as log:
        log.write(1, {"training/loss": 1})
        (tmp_path / "hidden").rename(tmp_path / "run")
        log.write(2, {"training/loss": 2})
    events = EventAccumulator(str(tmp_path / "run" / TENSORBOARD))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("training/loss")] == [(1, 1.0), (2, 2.0)]
    assert curve(tmp_path / "run") == {1: 1, 2: 2}
