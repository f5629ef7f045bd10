"""What a finished training or fine-tuning run reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple


class TrainResult(NamedTuple):
    """The figures of one run.

    Losses are the policy's own, in normalised action units; ``final_loss`` is the mean since the last logged row.
    The two action errors are mean squared errors in the units of the dataset over the same held-out windows;
    ``mean_action_mse`` is that of always predicting the mean action of the train split. Both are None without
    held-out demos.
    """

    run: Path
    steps: int
    seconds: float
    steps_per_s: float
    first_loss: float
    final_loss: float
    valid_action_mse: float | None
    mean_action_mse: float | None
    source: str
    checkpoint: Path

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "run": str(self.run), "checkpoint": str(self.checkpoint)}
