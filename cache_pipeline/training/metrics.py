"""A run's figures over its steps: ``metrics.csv`` and TensorBoard."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cache_pipeline.errors import MissingExtraError
from cache_pipeline.files import read_json

COLUMNS = (
    "step",
    "training/loss",
    "training/lr_share",
    "validation/action_mse",
    "validation/mean_action_mse",
    "time/seconds",
    "time/steps_per_s",
)
CSV_NAME, TENSORBOARD = "metrics.csv", "tensorboard"


class MetricsLog:
    """Appends rows; a resumed run first drops the rows that it will write again. Use as a context manager.

    Args:
        run: the run folder.
        start: step from which the run goes on.
        wandb: the Weights & Biases project that gets the figures too; None for none.
    """

    def __init__(self, run: Path, start: int, wandb: str | None = None) -> None:
        self._path = run / CSV_NAME
        kept = [row for row in read_metrics(run) if row["step"] <= start] if start else []
        self._file = self._path.open("w", newline="", encoding="utf-8")
        self._rows = csv.DictWriter(self._file, COLUMNS, restval="")
        self._rows.writeheader()
        for row in kept:
            self._rows.writerow({name: value for name, value in row.items() if value is not None})
        self._boards: list[Any] = [_Board(run / TENSORBOARD)]
        if wandb is not None:
            self._boards.append(_Wandb(wandb, run))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one row; names are among ``COLUMNS``."""
        self._rows.writerow({"step": step, **{name: f"{value:.9g}" for name, value in values.items()}})
        self._file.flush()
        for board in self._boards:
            board.write(step, values)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._file.close()
        for board in self._boards:
            board.close()


class _Board:
    """TensorBoard events, without the part of it that would import TensorFlow."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer: Any = EventFileWriter(str(folder))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A Weights & Biases run named as the run folder."""

    def __init__(self, project: str, run: Path) -> None:
        self._run = _wandb().init(project=project, name=run.name, dir=str(run), config=read_json(run / "run.json"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def check_wandb(project: str | None) -> None:
    """Raises MissingExtraError if figures are to go to Weights & Biases and its client is not installed."""
    if project is not None:
        _wandb()


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise MissingExtraError("--wandb needs its client: pip install 'cache-pipeline[wandb]'") from error
    return wandb


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.csv``: ``step`` an int, the others floats or None. Empty if there is no such file."""
    path = run / CSV_NAME
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [
        {name: int(value) if name == "step" else (float(value) if value else None) for name, value in row.items()}
        for row in rows
    ]
