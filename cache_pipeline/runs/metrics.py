"""Metrics of a run over its steps: ``metrics.csv``, TensorBoard and Weights & Biases."""

from __future__ import annotations

import csv
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.errors import CheckpointError, MissingExtraError, described, install_command
from cache_pipeline.files import atomic_path, free_path, read_json
from cache_pipeline.runs.checkpoint import CHECKPOINTS, SUCCESS_RATE, describe_checkpoint

logger = logging.getLogger("cache_pipeline")

COLUMNS = (
    "step",
    "training/loss",
    "training/lr",
    "training/encoder_lr",
    "validation/action_mse",
    "validation/mean_action_mse",
    SUCCESS_RATE,
    "rollout/episodes",
    "time/seconds",
    "time/steps_per_s",
)
# Columns of every version.
LATER = ("training/lr", "training/encoder_lr", SUCCESS_RATE, "rollout/episodes")
ALWAYS = tuple(name for name in COLUMNS if name not in LATER)
CSV_NAME, TENSORBOARD = "metrics.csv", "tensorboard"


class MetricsLog:
    """Appends rows. On resume, a row of an earlier process stays until training reaches its step again.

    The files stay open when the run folder is moved. Use as a context manager.

    Args:
        run: the run folder.
        start: step from which the run continues.
        wandb: Weights & Biases project to log to as well; None for none.
        place: final path of the run; it names the run in Weights & Biases.
    """

    def __init__(self, run: Path, start: int, wandb: str | None = None, place: Path | None = None) -> None:
        self._path = run / CSV_NAME
        rows = _rows_or_rebuilt(run)
        self._before = [row for row in rows if row["step"] <= start]
        self._later = [row for row in rows if row["step"] > start]
        try:
            self._rewrite()
            self._boards: list[Any] = [_Board(run / TENSORBOARD)]
        except OSError as error:
            raise self._unwritable(error) from error
        if wandb is not None:
            self._boards.append(_Wandb(wandb, place if place is not None else run, read_json(run / "run.json")))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one row; names must be in ``COLUMNS``. Raises CheckpointError if it cannot be written."""
        row = {"step": step, **{name: f"{value:.9g}" for name, value in values.items()}}
        try:
            if self._later:
                self._before.append(row)
                self._later = [row for row in self._later if row["step"] > step]
                self._file.close()
                self._rewrite()
            else:
                csv.DictWriter(self._file, COLUMNS, restval="").writerow(row)
                self._file.flush()
            for board in self._boards:
                board.write(step, values)
        except OSError as error:
            raise self._unwritable(error) from error

    def _rewrite(self) -> None:
        """Replaces the file by one with all rows, and opens it for appending."""
        with atomic_path(self._path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            rows = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
            rows.writeheader()
            rows.writerows(
                {name: value for name, value in row.items() if value is not None}
                for row in (*self._before, *self._later)
            )
        self._file = self._path.open("a", newline="", encoding="utf-8")

    def _unwritable(self, error: OSError) -> CheckpointError:
        reason = described(error, "continue with --resume")
        return CheckpointError(f"cannot write the metrics of {self._path.parent} ({reason}); checkpoints are intact")

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        # Every row was flushed already; a write error was raised at that time.
        for opened in (self._file, *self._boards):
            with suppress(OSError):
                opened.close()


class _Board:
    """Writes TensorBoard events without the part of TensorBoard that imports TensorFlow."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        # TensorBoard's own writer opens its file by name at each flush; the name changes when the run is moved.
        self._writer: Any = RecordWriter((folder / name).open("xb"))
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._add(Event(wall_time=time.time(), step=step, summary=summary))

    def _add(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A Weights & Biases run with the name of the run folder. Its files lie beside the folder, which may be moved."""

    def __init__(self, project: str, run: Path, config: Any) -> None:
        self._run = _wandb().init(project=project, name=run.name, dir=str(run.parent), config=config)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def check_wandb(project: str | None) -> None:
    """Raises MissingExtraError if a Weights & Biases project is given and its client is not installed."""
    if project is not None:
        _wandb()


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise MissingExtraError(f"--wandb needs its client: {install_command('wandb')}") from error
    return wandb


UNKNOWN_MEAN_ACTION_ERROR = "and that of always predicting the mean action is not recorded"
NO_MEAN_ACTION_ERROR = "the held-out actions are all equal to the mean action, so there is no error to compare with"


def fraction_of_mean_action(mse: float, mean_action_mse: float | None) -> float | None:
    """Returns the held-out error over that of always predicting the mean action; None if the latter is 0 or unknown."""
    return mse / mean_action_mse if mean_action_mse is not None and mean_action_mse > 0 else None


def of_mean_action(mse: float, mean_action_mse: float | None) -> str:
    """Returns :func:`fraction_of_mean_action` in words."""
    fraction = fraction_of_mean_action(mse, mean_action_mse)
    if fraction is None:
        return NO_MEAN_ACTION_ERROR if mean_action_mse is not None else UNKNOWN_MEAN_ACTION_ERROR
    return f"{fraction:.0%} of the error of always predicting the mean action ({mean_action_mse:.4g})"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Reads the rows of ``metrics.csv``: ``step`` is an int, other values floats or None. Empty if there is no file.

    An incomplete last line is skipped. Raises CheckpointError if the file is damaged in another way.
    """
    path = run / CSV_NAME
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(line for line in file if line.endswith("\n"))
            if lacking := [name for name in ALWAYS if reader.fieldnames and name not in reader.fieldnames]:
                raise ValueError(f"it has no column {lacking[0]}")
            return [{**dict.fromkeys(COLUMNS), **_row(row)} for row in reader]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); resume the run to rebuild it from the checkpoints, or move it away"
        ) from error


def series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns the steps at which a metric was measured, and its values."""
    known = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return np.array([step for step, _ in known], np.int64), np.array([value for _, value in known], np.float64)


def _row(row: dict[str, str]) -> dict[str, Any]:
    if None in row or None in row.values():
        raise ValueError(f"the row of step {row.get('step')} has another number of values than the header")
    return {name: int(value) if name == "step" else (float(value) if value else None) for name, value in row.items()}


def _rows_or_rebuilt(run: Path) -> list[dict[str, Any]]:
    """Reads the rows of a run. A damaged file is moved aside, and the metrics of the checkpoints take its place."""
    try:
        return read_metrics(run)
    except CheckpointError as error:
        path, aside = run / CSV_NAME, free_path(run / f"{CSV_NAME}.damaged")
        with suppress(OSError):
            path.rename(aside)
        logger.warning("%s; it is rebuilt from the checkpoints, and kept as %s", str(error).split(";")[0], aside.name)
    rows = []
    for folder in sorted((run / CHECKPOINTS).glob("step_*")):
        with suppress(CheckpointError):
            saved = describe_checkpoint(folder)
            rows.append({"step": saved.step, **{name: saved.metrics.get(name) for name in COLUMNS if name != "step"}})
    return sorted(rows, key=lambda row: row["step"])
