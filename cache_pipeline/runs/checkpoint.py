"""Checkpoints of a run on disk.

    runs/lift/checkpoints/
      index.json       latest, best by held-out action error, and the names of all checkpoints of this run
      step_0004000/    model.safetensors  ema.safetensors  resume/optimizer.safetensors  checkpoint.json

A checkpoint is written to a hidden folder and renamed when complete; ``checkpoint.json`` lists its files' digests.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cache_pipeline.errors import CheckpointError
from cache_pipeline.files import free_path, remove, write_json
from cache_pipeline.runs.record import FORMAT, RUN_JSON, read_object
from cache_pipeline.runs.tensors import check_tensors, first_not_finite, place_folder, read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINT_JSON, INDEX = "checkpoint.json", "index.json"
MODEL, EMA, RESUME = "model.safetensors", "ema.safetensors", "resume/optimizer.safetensors"
CHECKPOINTS = "checkpoints"


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


class CheckpointFolder:
    """The ``checkpoints`` folder of a run.

    Its index records every checkpoint of this run; no other folder is ever removed.

    Args:
        run: the run folder.
        keep_best: number of checkpoints with the lowest held-out action error to keep beside the latest.
        saved: called after each save with its step; returns the path of the run from then on.
    """

    def __init__(self, run: Path, keep_best: int, saved: Callable[[int], Path] | None = None) -> None:
        self._run, self._keep, self._saved = run, keep_best, saved
        self._index = read_index(run)

    @property
    def best(self) -> dict[str, Any] | None:
        """``{name, step, valid_action_mse}`` of the checkpoint with the lowest held-out action error, if any."""
        return self._index["best"][0] if self._index["best"] else None

    @property
    def latest(self) -> Path | None:
        """Folder of the last saved checkpoint; None if there is none."""
        name = self._index["latest"]
        return None if name is None else self._run / CHECKPOINTS / name

    def is_among_best(self, error: float) -> bool:
        """Whether a checkpoint with this held-out action error would be kept as one of the best."""
        best = self._index["best"]
        return self._keep > 0 and (len(best) < self._keep or error < best[-1]["valid_action_mse"])

    def save(
        self, step: int, state: State, metrics: dict[str, Any], progress: dict[str, Any], error: float | None
    ) -> Path:
        """Saves the state after ``step`` updates; ``error`` is its held-out action error, if measured at that step.

        Raises:
            CheckpointError: a value is not finite, or the files cannot be written; earlier checkpoints stay intact.
        """
        self.check_finite(step, state)
        folder, value = self._run / CHECKPOINTS, {"format": FORMAT, "step": step, "metrics": metrics}
        name = self._name(step)
        partial = _partial(folder / name)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._write_index({**self._index, "made": list(dict.fromkeys([*self._index["made"], name]))})
            remove(partial)
            (partial / "resume").mkdir(parents=True)
            files = {file: write_tensors(partial / file, values) for file, values in state.by_file().items()}
            write_json(partial / CHECKPOINT_JSON, {**value, "progress": progress, "files": files})
            place_folder(partial, folder / name)
            self._enter(name, step, error)
            if self._saved is not None:
                self._run = self._saved(step)
        except (OSError, ValueError) as error_:
            raise CheckpointError(f"cannot save step {step} in {self._run} ({error_}); {self.kept()}") from error_
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
        return path.name if path.name in self._index["made"] else free_path(path).name

    def _enter(self, name: str, step: int, error: float | None) -> None:
        best = [entry for entry in self._index["best"] if entry["name"] != name]
        if error is not None:
            best.append({"name": name, "step": step, "valid_action_mse": error})
        best.sort(key=lambda entry: (entry["valid_action_mse"], entry["step"]))
        index = {"latest": name, "best": best[: self._keep]}
        kept = {name, *(entry["name"] for entry in index["best"])}
        self._write_index({**index, "made": self._index["made"]})
        folder, left = self._run / CHECKPOINTS, []
        for made in self._index["made"]:
            if made not in kept:
                shutil.rmtree(folder / made, ignore_errors=True)
                shutil.rmtree(_partial(folder / made), ignore_errors=True)
            if made in kept or (folder / made).exists():
                left.append(made)
        self._write_index({**index, "made": left})

    def _write_index(self, index: dict[str, Any]) -> None:
        write_json(self._run / CHECKPOINTS / INDEX, index)
        self._index = index


def read_index(run: Path) -> dict[str, Any]:
    """Reads {"latest": name or None, "best": [{name, step, valid_action_mse}, …], "made": [name, …]}, best first."""
    path = run / CHECKPOINTS / INDEX
    if not path.is_file():
        return {"latest": None, "best": [], "made": []}
    value = read_object(path)
    best, latest = value.get("best", []), value.get("latest")
    names = [*([] if latest is None else [latest]), *(entry.get("name") for entry in best)]
    made = value.get("made", names)
    if not all(isinstance(name, str) and Path(name).name == name for name in [*names, *made]):
        raise CheckpointError(f"{path} is damaged: it has invalid names; remove it and resume from a checkpoint folder")
    return {"latest": latest, "best": best, "made": made}


def has_checkpoint(run: Path) -> bool:
    """Whether a run has saved a checkpoint; a damaged index counts as one."""
    try:
        return read_index(run)["latest"] is not None
    except CheckpointError:
        return True


def remove_checkpoints(run: Path) -> None:
    """Removes the checkpoints that a run's index records; other folders stay."""
    folder = run / CHECKPOINTS
    try:
        made = read_index(run)["made"]
    except CheckpointError:
        made = []
    for name in made:
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
    names = [entry["name"] for entry in index["best"]]
    name = index["latest"] if latest or not names else names[0]
    if name is None:
        raise CheckpointError(f"{path} has no checkpoint yet; wait for its first save, or start its command again")
    return path, path / CHECKPOINTS / name


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads one checkpoint folder and checks the digest of every file; raises CheckpointError."""
    value = _described(path)
    read = [read_tensors(path / file, str(value["files"].get(file))) for file in (MODEL, EMA, RESUME)]
    return Checkpoint(path, value["step"], value.get("metrics", {}), value.get("progress", {}), State(*read))


def check_checkpoint(path: Path) -> None:
    """Checks the digest of every file without building tensors; raises CheckpointError."""
    value = _described(path)
    for file in (MODEL, EMA, RESUME):
        check_tensors(path / file, str(value["files"].get(file)))


def _described(path: Path) -> dict[str, Any]:
    value = read_object(path / CHECKPOINT_JSON)
    if (
        value.get("format") != FORMAT
        or not isinstance(value.get("files"), dict)
        or not isinstance(value.get("step"), int)
    ):
        raise CheckpointError(f"{path / CHECKPOINT_JSON} is not a checkpoint of format {FORMAT}")
    return value


def _partial(checkpoint: Path) -> Path:
    """Returns the hidden folder in which a checkpoint is written before it is complete."""
    return checkpoint.with_name(f".{checkpoint.name}.partial")
