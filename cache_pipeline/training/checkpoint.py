"""Runs and checkpoints on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from cache_pipeline.policies.visuomotor import VisuomotorPolicy


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
        return [f"{name}: {value}" for name, value in self.to_json().items()]


def load_policy(path: str | Path, device: str = "cpu") -> VisuomotorPolicy:
    """The policy of a run (its best checkpoint, else its latest) or of one checkpoint folder, ready for ``act``.

    Raises CheckpointError if anything is missing, damaged or from another version. Nothing is unpickled.
    """
    raise NotImplementedError


def inspect_run(path: str | Path) -> RunSummary:
    """Summarises a run folder without loading weights; raises CheckpointError if it is not one."""
    raise NotImplementedError
