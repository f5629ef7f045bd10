"""Checkpoints of a run on disk.

    runs/lift/checkpoints/
      index.json       latest, best by success or held-out action error, and the names of all checkpoints of this run
      step_0004000/    model.safetensors  ema.safetensors  resume/optimizer.safetensors  checkpoint.json

A checkpoint is written to a hidden folder and renamed when complete; ``checkpoint.json`` lists its files' digests.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cache_pipeline.errors import CheckpointError, described
from cache_pipeline.files import finite, free_path, remove, typed, write_json
from cache_pipeline.runs.record import FORMAT, RUN_JSON, read_object
from cache_pipeline.runs.tensors import check_tensors, first_not_finite, place_folder, read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("cache_pipeline")

CHECKPOINT_JSON, INDEX = "checkpoint.json", "index.json"
MODEL, EMA, RESUME = "model.safetensors", "ema.safetensors", "resume/optimizer.safetensors"
CHECKPOINTS = "checkpoints"
PER_DIM = "validation/action_mse_per_dim"
"""The metric that is a list: one error per dimension of the action."""
SUCCESS_RATE = "rollout/success_rate"
"""The metric of rollouts in training; a checkpoint has it only if they were made at its step."""
CHECKPOINT_NAME = re.compile(r"step_\d{7,}(_\d+)?")
_warned: set[Path] = set()


class State(NamedTuple):
    """The tensors of a checkpoint, by name.

    Attributes:
        model: weights and statistics of the policy.
        ema: averaged weights; empty without them.
        resume: optimiser and random state.
    """

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    resume: dict[str, Tensor]

    def by_file(self) -> dict[str, dict[str, Tensor]]:
        """Returns the tensors of each file, by file name."""
        return {MODEL: self.model, EMA: self.ema, RESUME: self.resume}


class Checkpoint(NamedTuple):
    """One checkpoint, with its tensors in memory.

    Attributes:
        step: number of updates before it was saved.
        metrics: metrics at that step, as in metrics.csv.
        progress: state of the training loop, from which it continues.
    """

    path: Path
    step: int
    metrics: dict[str, Any]
    progress: dict[str, Any]
    state: State


class Score(NamedTuple):
    """What decides which checkpoints are the best.

    Attributes:
        error: held-out action error; None without held-out demos.
        success: success rate of the rollouts at this step; None without ``--rollout-every``.
    """

    error: float | None
    success: float | None = None

    @property
    def order(self) -> tuple[float, float]:
        """Sorts the best first: highest success, those without rollouts last; ties by the lowest error."""
        return (1.0 if self.success is None else -self.success), (math.inf if self.error is None else self.error)


@dataclass(frozen=True)
class Best:
    """One of the best checkpoints."""

    name: str
    step: int
    valid_action_mse: float | None
    success_rate: float | None = None

    @property
    def order(self) -> tuple[float, float, int]:
        """Sorts the best first, see ``Score``; ties by step."""
        return *Score(self.valid_action_mse, self.success_rate).order, self.step


class Index(NamedTuple):
    """The index of a run: names of the latest checkpoint, of the best ones, best first, and of all that it made."""

    latest: str | None = None
    best: tuple[Best, ...] = ()
    made: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"latest": self.latest, "best": [asdict(entry) for entry in self.best], "made": list(self.made)}


class Description(NamedTuple):
    """The contents of checkpoint.json."""

    step: int
    metrics: dict[str, float | list[float] | None]
    progress: dict[str, Any]
    files: dict[str, str]


class CheckpointFolder:
    """The ``checkpoints`` folder of a run.

    Its index records every checkpoint of this run; no other folder is ever removed.

    Args:
        run: the run folder.
        keep_best: number of the best checkpoints (see ``Score``) to keep beside the latest.
        saved: called after each save with its step; returns the path of the run from then on.
    """

    def __init__(self, run: Path, keep_best: int, saved: Callable[[int], Path] | None = None) -> None:
        self._run, self._keep, self._saved = run, keep_best, saved
        self._index = read_index(run)

    @property
    def best(self) -> Best | None:
        """The best checkpoint, if any."""
        return self._index.best[0] if self._index.best else None

    @property
    def latest(self) -> Path | None:
        """Folder of the last saved checkpoint; None if there is none."""
        name = self._index.latest
        return None if name is None else self._run / CHECKPOINTS / name

    def is_among_best(self, score: Score) -> bool:
        """Whether a checkpoint with this score would be kept as one of the best."""
        best = self._index.best
        return self._keep > 0 and (len(best) < self._keep or score.order < best[-1].order[:2])

    def save(
        self, step: int, state: State, metrics: dict[str, Any], progress: dict[str, Any], score: Score | None
    ) -> Path:
        """Saves the state after ``step`` updates; ``score`` is None if it was not measured at that step.

        Raises:
            CheckpointError: a value is not finite, or the files cannot be written; earlier checkpoints stay intact.
        """
        self.check_finite(step, state)
        folder, value = self._run / CHECKPOINTS, {"format": FORMAT, "step": step, "metrics": metrics}
        name = self._name(step)
        partial = _partial(folder / name)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._write_index(self._index._replace(made=tuple(dict.fromkeys([*self._index.made, name]))))
            remove(partial)
            (partial / "resume").mkdir(parents=True)
            files = {file: write_tensors(partial / file, values) for file, values in state.by_file().items()}
            write_json(partial / CHECKPOINT_JSON, {**finite(value), "progress": finite(progress), "files": files})
            place_folder(partial, folder / name)
            self._enter(name, step, score)
            if self._saved is not None:
                self._run = self._saved(step)
        except (OSError, ValueError) as error:
            then = "run the same command again" if self.latest is None else "continue with --resume"
            raise CheckpointError(
                f"cannot save step {step} in {self._run} ({described(error, then)}); {self.kept()}"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return self._run / CHECKPOINTS / name

    def check_finite(self, step: int, state: State) -> None:
        """Raises CheckpointError if a value of a tensor is not finite."""
        for file, values in state.by_file().items():
            name = first_not_finite(values)
            if name is not None:
                raise CheckpointError(
                    f"{name} of {file} is not finite after step {step}, so step {step} is not saved; {self.kept()}; "
                    f"lower --lr, or check the actions with inspect"
                )

    def kept(self) -> str:
        """Returns the part of an error message that names the last checkpoint."""
        if self.latest is None:
            return "no checkpoint was saved before"
        return f"the last checkpoint is {self.latest}"

    def _name(self, step: int) -> str:
        """Returns a name for the checkpoint that no foreign folder has."""
        path = self._run / CHECKPOINTS / f"step_{step:07d}"
        return path.name if path.name in self._index.made else free_path(path).name

    def _enter(self, name: str, step: int, score: Score | None) -> None:
        best = [entry for entry in self._index.best if entry.name != name]
        if score is not None:
            best.append(Best(name, step, *score))
        best.sort(key=lambda entry: entry.order)
        index = Index(name, tuple(best[: self._keep]), self._index.made)
        kept = {name, *(entry.name for entry in index.best)}
        self._write_index(index)
        folder, left = self._run / CHECKPOINTS, []
        for made in index.made:
            if made not in kept:
                shutil.rmtree(folder / made, ignore_errors=True)
                shutil.rmtree(_partial(folder / made), ignore_errors=True)
            if made in kept or (folder / made).exists():
                left.append(made)
        self._write_index(index._replace(made=tuple(left)))

    def _write_index(self, index: Index) -> None:
        write_json(self._run / CHECKPOINTS / INDEX, index.to_json())
        self._index = index


def read_index(run: Path) -> Index:
    """Reads the index of a run. A damaged index is rebuilt from the checkpoints in its folder, with a warning."""
    path = run / CHECKPOINTS / INDEX
    if not path.is_file():
        return Index()
    try:
        value = read_object(path)
        best, latest = typed(value["best"], tuple[Best, ...]), typed(value["latest"], str | None)
        if latest is None and best:
            raise ValueError("it names a best checkpoint but no latest one")
        names = [*([] if latest is None else [latest]), *(entry.name for entry in best)]
        made = typed(value.get("made", names), tuple[str, ...])
        for name in (*names, *made):
            if name in ("", ".", "..") or Path(name).name != name:
                raise ValueError(f"{name!r} is not a name of a checkpoint")
        for name in names:
            if not (path.parent / name / CHECKPOINT_JSON).is_file():
                raise ValueError(f"it names {name}, which is missing")
        return Index(latest, best, made)
    except (CheckpointError, ValueError, KeyError) as error:
        index = _rebuilt_index(path.parent)
        found = "no checkpoint was found beside it" if index.latest is None else f"{index.latest} is the latest"
        reason = str(error).removeprefix(f"{path} is damaged ").strip("()")
        if path not in _warned:
            _warned.add(path)
            logger.warning("%s is damaged (%s); it is rebuilt from the checkpoints beside it: %s", path, reason, found)
        return index


def _rebuilt_index(folder: Path) -> Index:
    """Lists the checkpoints in a folder. None of them but the latest and the best counts as made by this run, and
    folders of other names are not looked at, so that what the user put there is never removed."""
    found: list[Best] = []
    for path in sorted(path for path in folder.glob("step_*") if CHECKPOINT_NAME.fullmatch(path.name)):
        with suppress(CheckpointError):
            described = describe_checkpoint(path)
            measured = [described.metrics.get(name) for name in ("validation/action_mse", SUCCESS_RATE)]
            error, success = (value if isinstance(value, int | float) else None for value in measured)
            found.append(Best(path.name, described.step, error, success))
    if not found:
        return Index()
    latest = max(found, key=lambda entry: entry.step).name
    best = sorted((entry for entry in found if entry.order[:2] != Score(None).order), key=lambda entry: entry.order)
    return Index(latest, tuple(best[:1]), tuple(dict.fromkeys([latest, *(entry.name for entry in best[:1])])))


def has_checkpoint(run: Path) -> bool:
    """Whether a run has saved a checkpoint."""
    return read_index(run).latest is not None


def remove_checkpoints(run: Path) -> None:
    """Removes the checkpoints that a run's index records; other folders stay."""
    folder = run / CHECKPOINTS
    for name in read_index(run).made:
        remove(folder / name)
        remove(_partial(folder / name))
    (folder / INDEX).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def find_checkpoint(path: Path, *, latest: bool = False) -> tuple[Path, Path]:
    """Finds (run folder, checkpoint folder) of a run or checkpoint; for a run the best checkpoint, else the latest.

    Raises:
        CheckpointError: the path is no run, or the run has no checkpoint.
    """
    if (path / CHECKPOINT_JSON).is_file():
        return path.resolve().parent.parent, path
    if not (path / RUN_JSON).is_file():
        raise CheckpointError(f"{path} is neither a run (run.json) nor a checkpoint (checkpoint.json); train makes one")
    index = read_index(path)
    name = index.latest if latest or not index.best else index.best[0].name
    if name is None:
        raise CheckpointError(f"{path} has no checkpoint yet; wait for its first save, or start its command again")
    return path, path / CHECKPOINTS / name


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads one checkpoint folder and checks the digest of every file; raises CheckpointError."""
    value = describe_checkpoint(path)
    read = [read_tensors(path / file, str(value.files.get(file))) for file in (MODEL, EMA, RESUME)]
    return Checkpoint(path, value.step, value.metrics, value.progress, State(*read))


def check_checkpoint(path: Path) -> None:
    """Checks the digest of every file without building tensors; raises CheckpointError."""
    value = describe_checkpoint(path)
    for file in (MODEL, EMA, RESUME):
        check_tensors(path / file, str(value.files.get(file)))


def describe_checkpoint(path: Path) -> Description:
    """Reads checkpoint.json without the tensors; raises CheckpointError."""
    file = path / CHECKPOINT_JSON
    value = read_object(file)
    if value.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not a checkpoint of format {FORMAT}")
    try:
        found: Description = typed([value.get(name, {}) for name in Description._fields], Description)
        if found.step < 0:
            raise ValueError(f"its step is {found.step}")
        if lists := [name for name, item in found.metrics.items() if isinstance(item, list) and name != PER_DIM]:
            raise ValueError(f"its {lists[0]} is a list")
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    return found


def _partial(checkpoint: Path) -> Path:
    """Returns the hidden folder in which a checkpoint is written before it is complete."""
    return checkpoint.with_name(f".{checkpoint.name}.partial")
