"""Summarises a dataset, cache or run, and checks whether it is sound."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cache_pipeline.demos.remote import has_dataset, local_path
from cache_pipeline.errors import CheckpointError, DatasetError
from cache_pipeline.files import Location


class Summary(Protocol):
    """Interface of a summary that ``inspect`` prints."""

    def to_json(self) -> dict[str, Any]: ...

    def lines(self) -> list[str]: ...


class Broken(NamedTuple):
    """Summary of something too damaged to be summarised."""

    path: str
    kind: str
    problem: str

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "kind": self.kind}

    def lines(self) -> list[str]:
        """For people."""
        return [f"{self.kind} {self.path}", f"  PROBLEM  {self.problem}"]


class Inspection(NamedTuple):
    """A summary and the problems of its subject; it is sound without problems."""

    summary: Summary
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the summary's fields, ``sound`` and ``problems``."""
        return {**self.summary.to_json(), "sound": not self.problems, "problems": list(self.problems)}

    def lines(self) -> list[str]:
        """Returns the summary's lines."""
        return self.summary.lines()


def inspect_path(path: Location) -> Inspection:
    """Summarises the dataset, cache or run at ``path``; its problems are returned, not raised.

    Raises:
        DatasetError: ``path`` is missing, or is none of the three.
    """
    from cache_pipeline.demos.layouts.registry import is_dataset

    if isinstance(path, str):
        return _inspect_dataset(Path(path)) if has_dataset(path) else _inspect_cache(path)
    if path.is_dir():
        if any((path / name).exists() for name in ("run.json", "checkpoint.json")):
            return _inspect_run(path)
        if any((path / name).exists() for name in ("manifest.json", "ledger", "zarr.json")):
            return _inspect_cache(path)
        if not is_dataset(path):
            raise DatasetError(
                f"{path}: neither a dataset nor a cache nor a run; give a .hdf5 file, or a folder of LeRobot, "
                "of a cache or of a run"
            )
    return _inspect_dataset(path)


def _inspect_dataset(path: Path) -> Inspection:
    from cache_pipeline.demos.layouts.registry import is_dataset
    from cache_pipeline.demos.summary import inspect_dataset

    try:
        dataset = inspect_dataset((local_path(path),))
    except DatasetError as error:
        if not is_dataset(path):
            raise
        return Inspection(Broken(str(path), "dataset", str(error)), (str(error),))
    return Inspection(dataset, dataset.all_problems)


def _inspect_cache(path: Location) -> Inspection:
    from cache_pipeline.cache.summary import inspect_cache

    cache = inspect_cache(path)
    return Inspection(cache, cache.problems)


def _inspect_run(path: Path) -> Inspection:
    from cache_pipeline.runs.summary import inspect_run

    try:
        summary = inspect_run(path)
    except CheckpointError as error:
        return Inspection(Broken(str(path), "run", str(error)), (str(error),))
    names = dict.fromkeys([*summary.best, *([summary.latest] if summary.latest else [])])
    problems = tuple(_run_problems(summary.run, list(names)))
    return Inspection(_WithProblems(summary, problems), problems)


class _WithProblems(NamedTuple):
    """A summary, and problems that it does not contain."""

    summary: Summary
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return self.summary.to_json()

    def lines(self) -> list[str]:
        return [*self.summary.lines(), *(f"PROBLEM  {problem}" for problem in self.problems)]


def _run_problems(run: Path, checkpoints: list[str]) -> Iterator[str]:
    """Yields unreadable checkpoints and encoder files. Executes nothing that the run names."""
    from safetensors import SafetensorError, safe_open

    from cache_pipeline.runs.checkpoint import CHECKPOINTS, check_checkpoint
    from cache_pipeline.runs.record import read_record

    for name in checkpoints:
        try:
            check_checkpoint(run / CHECKPOINTS / name)
        except CheckpointError as error:
            yield str(error)
    for file in dict.fromkeys(read_record(run).policy.encoder_files.values()):
        try:
            with safe_open(run / file, "np"):
                pass
        except (SafetensorError, OSError) as error:
            yield f"{run / file} cannot be read ({error}); train again"
