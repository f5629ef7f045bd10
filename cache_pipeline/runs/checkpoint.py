"""Runs and checkpoints on disk.

    runs/lift/
      run.json                  what was asked, what it was trained on, what the policy is built from
      encoder.safetensors       the encoder that the run began with
      metrics.csv  tensorboard/
      checkpoints/index.json    latest, best by held-out action error, and the names of all that were made here
      checkpoints/step_0004000/ model.safetensors  ema.safetensors  resume/optimizer.safetensors  checkpoint.json

A checkpoint is written beside its place and renamed when it is whole; ``checkpoint.json`` lists its files' digests.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from cache_pipeline.encoders.device import resolve_device
from cache_pipeline.encoders.factory import Factories
from cache_pipeline.encoders.image_encoder import ImageEncoder
from cache_pipeline.encoders.saving import load_encoders
from cache_pipeline.errors import CachePipelineError, CheckpointError, ConfigError
from cache_pipeline.files import free_path, read_json, remove, write_json
from cache_pipeline.policies.robomimic.config import PREFIX
from cache_pipeline.policies.robomimic.policy import build_robomimic_policy
from cache_pipeline.policies.spec import PolicySpec, build_policy
from cache_pipeline.runs.tensors import first_not_finite, place_folder, read_tensors, write_tensors

if TYPE_CHECKING:
    from cache_pipeline.training.update.learner import Learner

FORMAT = 1
RUN_JSON, CHECKPOINT_JSON, INDEX = "run.json", "checkpoint.json", "index.json"
MODEL, EMA, RESUME = "model.safetensors", "ema.safetensors", "resume/optimizer.safetensors"
CHECKPOINTS = "checkpoints"


class Checkpoint(NamedTuple):
    """One checkpoint folder, its tensors read.

    Attributes:
        step: updates made before it was saved.
        metrics: figures at that step, as in metrics.csv.
        progress: figures that the loop carries on with.
    """

    path: Path
    step: int
    metrics: dict[str, Any]
    progress: dict[str, Any]
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    resume: dict[str, Tensor]


class RunSummary(NamedTuple):
    """What a run folder holds."""

    run: Path
    kind: str
    policy: str
    step: int
    steps: int
    cameras: tuple[str, ...]
    low_dim: tuple[str, ...]
    action_dim: int
    valid_action_mse: float | None
    mean_action_mse: float | None
    latest: str | None
    best: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "run": str(self.run)}

    def lines(self) -> list[str]:
        """The summary as lines for a terminal."""
        lines = [
            f"run {self.run}: {self.kind}, policy {self.policy}, step {self.step} of {self.steps}",
            f"cameras {', '.join(self.cameras)}; low-dim {', '.join(self.low_dim) or 'none'}",
        ]
        if self.valid_action_mse is not None:
            lines.append(f"held-out action error {self.valid_action_mse:.4g} (mean action {self.mean_action_mse:.4g})")
        return [*lines, f"latest {self.latest or 'none'}; best {', '.join(self.best) or 'none'}"]


class CheckpointFolder:
    """The ``checkpoints`` folder of a run.

    Its index records every folder that is made here, and nothing else is ever removed.

    Args:
        run: the run folder.
        keep_best: how many checkpoints with the least held-out action error are kept beside the latest.
        saved: called after each save with its step; where the run lies from then on.
    """

    def __init__(self, run: Path, keep_best: int, saved: Callable[[int], Path] | None = None) -> None:
        self._run, self._keep, self._saved = run, keep_best, saved
        self._index = read_index(run)

    @property
    def best(self) -> dict[str, Any] | None:
        """``{name, step, valid_action_mse}`` of the checkpoint with the least held-out action error, if any."""
        return self._index["best"][0] if self._index["best"] else None

    @property
    def latest(self) -> Path | None:
        """The checkpoint that was saved last."""
        name = self._index["latest"]
        return None if name is None else self._run / CHECKPOINTS / name

    def is_among_best(self, error: float) -> bool:
        """Whether a checkpoint of this held-out action error would be kept as one of the best."""
        best = self._index["best"]
        return self._keep > 0 and (len(best) < self._keep or error < best[-1]["valid_action_mse"])

    def save(
        self, step: int, learner: Learner, metrics: dict[str, Any], progress: dict[str, Any], error: float | None
    ) -> Path:
        """Saves the learner after ``step`` updates; ``error`` is its held-out action error if it was measured there.

        Raises:
            CheckpointError: a value is not finite, or it cannot be written; earlier checkpoints are whole.
        """
        tensors = {MODEL: learner.model_tensors(), EMA: learner.ema_tensors(), RESUME: learner.resume_tensors()}
        self.check_finite(step, tensors)
        folder, value = self._run / CHECKPOINTS, {"format": FORMAT, "step": step, "metrics": metrics}
        name = self._name(step)
        partial = _partial(folder / name)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._write_index({**self._index, "made": list(dict.fromkeys([*self._index["made"], name]))})
            remove(partial)
            (partial / "resume").mkdir(parents=True)
            files = {file: write_tensors(partial / file, values) for file, values in tensors.items()}
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

    def check_finite(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Raises CheckpointError if a tensor of ``{file: {name: tensor}}`` holds a value that is not finite."""
        for file, values in tensors.items():
            name = first_not_finite(values)
            if name is not None:
                raise CheckpointError(
                    f"{name} of {file} is not finite after step {step}, so it is not saved; {self.kept()}; lower --lr, "
                    f"or look at the actions with inspect"
                )

    def kept(self) -> str:
        """What there is to go on from, for an error."""
        if self.latest is None:
            return "no checkpoint was saved before"
        return f"the last checkpoint is {self.latest}"

    def _name(self, step: int) -> str:
        """A name for the checkpoint that nobody else's folder has."""
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
    """``{"latest": name or None, "best": [{name, step, valid_action_mse}, …], "made": [name, …]}``, the best first."""
    path = run / CHECKPOINTS / INDEX
    if not path.is_file():
        return {"latest": None, "best": [], "made": []}
    value = _read_object(path)
    best, latest = value.get("best", []), value.get("latest")
    names = [*([] if latest is None else [latest]), *(entry.get("name") for entry in best)]
    made = value.get("made", names)
    if not all(isinstance(name, str) and Path(name).name == name for name in [*names, *made]):
        raise CheckpointError(f"{path} is not what was written; remove it and resume from a checkpoint folder")
    return {"latest": latest, "best": best, "made": made}


def has_checkpoint(run: Path) -> bool:
    """Whether a run has saved a checkpoint; a damaged index counts as one."""
    try:
        return read_index(run)["latest"] is not None
    except CheckpointError:
        return True


def remove_checkpoints(run: Path) -> None:
    """Removes the checkpoints that a run's index records; any other folder among them stays."""
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
    """(run folder, checkpoint folder) of a run or of one of its checkpoints; of a run the best, else the latest.

    Raises:
        CheckpointError: there is no run, or it has no checkpoint.
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
    """Reads one checkpoint folder and checks every file's digest; raises CheckpointError."""
    value = _read_object(path / CHECKPOINT_JSON)
    files = value.get("files")
    if value.get("format") != FORMAT or not isinstance(files, dict) or not isinstance(value.get("step"), int):
        raise CheckpointError(f"{path / CHECKPOINT_JSON} is not a checkpoint of format {FORMAT}")
    read = {file: read_tensors(path / file, str(files.get(file))) for file in (MODEL, EMA, RESUME)}
    metrics, progress = value.get("metrics", {}), value.get("progress", {})
    return Checkpoint(path, value["step"], metrics, progress, read[MODEL], read[EMA], read[RESUME])


def read_run(run: Path) -> dict[str, Any]:
    """``run.json``; raises CheckpointError if it is missing, damaged or from another version."""
    value = _read_object(run / RUN_JSON)
    if value.get("format") != FORMAT:
        raise CheckpointError(f"{run / RUN_JSON} is not a run of format {FORMAT}")
    return value


def run_encoders(run: Path, spec: PolicySpec, encoder: Factories = None) -> dict[str, ImageEncoder]:
    """The encoders that a run began with; cameras with the same file share one module.

    Args:
        encoder: the factories that the user names; one that the run names alone is not run.
    """
    for file in spec.encoder_files.values():
        if Path(file).name != file:
            raise CheckpointError(f"{run / RUN_JSON} names an encoder outside the run: {file!r}")
    try:
        encoders = load_encoders({camera: run / file for camera, file in spec.encoder_files.items()}, encoder)
    except CachePipelineError as error:
        raise CheckpointError(f"the run's encoder cannot be loaded: {error}") from error
    for made in encoders.values():
        made.cut = spec.cut
    return encoders


def load_policy(path: str | Path, device: str = "cpu", *, encoder: Factories = None) -> Any:
    """The policy of a run (its best checkpoint, else its latest) or of one checkpoint folder, ready for ``act``.

    A ``VisuomotorPolicy`` with the averaged weights, if the run kept any; of a robomimic run a ``RobomimicPolicy``.

    Args:
        path: the run or checkpoint.
        device: where the policy computes.
        encoder: the factory of a run whose encoder is made by one: ``file.py:factory``. It runs only if it is named
            here, and must be the one with which the run was trained.

    Raises:
        CheckpointError: anything is missing, damaged or from another version; or the encoder's factory is not named, or
            has changed. Nothing is unpickled, and no code that the run names is run.
        MissingExtraError: a robomimic run, and robomimic is not installed.
    """
    run, folder = find_checkpoint(Path(path))
    value, checkpoint = read_run(run), read_checkpoint(folder)
    spec = PolicySpec.from_json(value.get("policy"))
    encoders = run_encoders(run, spec, encoder)
    policy: Any
    if spec.name.startswith(PREFIX):
        try:
            policy = build_robomimic_policy(spec, encoders, resolve_device(device))
        except ConfigError as error:
            raise CheckpointError(f"{run / RUN_JSON} is damaged, or not ours: {error}") from error
    else:
        policy = build_policy(spec, encoders).to(resolve_device(device)).requires_grad_(False)
    policy.load_tensors({**checkpoint.model, **checkpoint.ema})
    policy.env_args, policy.render_flags = value["data"].get("env_args"), value["data"].get("render_flags")
    policy.eval()
    return policy


def inspect_run(path: str | Path) -> RunSummary:
    """Summarises a run folder without loading weights; raises CheckpointError if it is not one."""
    path = Path(path)
    run = path.resolve().parent.parent if (path / CHECKPOINT_JSON).is_file() else path
    value, index = read_run(run), read_index(run)
    spec = PolicySpec.from_json(value.get("policy"))
    metrics: dict[str, Any] = {}
    step = 0
    if index["latest"] is not None:
        latest = _read_object(run / CHECKPOINTS / index["latest"] / CHECKPOINT_JSON)
        step, metrics = latest.get("step", 0), latest.get("metrics", {})
    return RunSummary(
        run=run,
        kind=value["kind"],
        policy=spec.name,
        step=step,
        steps=value["config"]["steps"],
        cameras=tuple(spec.cameras),
        low_dim=tuple(spec.low_dim),
        action_dim=spec.action_dim,
        valid_action_mse=metrics.get("validation/action_mse"),
        mean_action_mse=metrics.get("validation/mean_action_mse"),
        latest=index["latest"],
        best=tuple(entry["name"] for entry in index["best"]),
    )


def _partial(checkpoint: Path) -> Path:
    """Where a checkpoint is written before it is whole."""
    return checkpoint.with_name(f".{checkpoint.name}.partial")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object")
    return value
