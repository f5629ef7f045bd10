"""Summarises a run folder without loading weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from cache_pipeline.runs.checkpoint import CHECKPOINT_JSON, CHECKPOINTS, describe_checkpoint, read_index
from cache_pipeline.runs.record import read_record
from cache_pipeline.text import listed


class RunSummary(NamedTuple):
    """Summary of a run folder."""

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
        """Returns the summary as lines for a terminal."""
        lines = [
            f"run {self.run}: {self.kind}, policy {self.policy}, step {self.step} of {self.steps}",
            f"cameras {listed(self.cameras)}; low-dim {listed(self.low_dim) or 'none'}",
        ]
        if self.valid_action_mse is not None:
            mean = "" if self.mean_action_mse is None else f" (mean action {self.mean_action_mse:.4g})"
            lines.append(f"held-out action error {self.valid_action_mse:.4g}{mean}")
        return [*lines, f"latest {self.latest or 'none'}; best {', '.join(self.best) or 'none'}"]


def inspect_run(path: str | Path) -> RunSummary:
    """Summarises a run folder or a checkpoint's run; raises CheckpointError if the path is neither."""
    path = Path(path)
    run = path.resolve().parent.parent if (path / CHECKPOINT_JSON).is_file() else path
    record, index = read_record(run), read_index(run)
    spec = record.policy
    metrics: dict[str, Any] = {}
    step = 0
    if index.latest is not None:
        step, metrics = describe_checkpoint(run / CHECKPOINTS / index.latest)[:2]
    return RunSummary(
        run=run,
        kind=record.kind,
        policy=spec.name,
        step=step,
        steps=record.steps,
        cameras=tuple(spec.cameras),
        low_dim=tuple(spec.low_dim),
        action_dim=spec.action_dim,
        valid_action_mse=metrics.get("validation/action_mse"),
        mean_action_mse=metrics.get("validation/mean_action_mse"),
        latest=index.latest,
        best=tuple(entry.name for entry in index.best),
    )
