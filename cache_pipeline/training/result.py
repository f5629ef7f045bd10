"""Result of a finished training or fine-tuning run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from cache_pipeline.errors import counted
from cache_pipeline.runs.checkpoint import CHECKPOINTS, SUCCESS_RATE, Best
from cache_pipeline.runs.metrics import of_mean_action
from cache_pipeline.training.data.source import source_in_words
from cache_pipeline.training.journal import START_ERROR, Journal


class TrainResult(NamedTuple):
    """Results of one run.

    Losses are the policy's own, in normalised action units; ``final_loss`` is the mean since the last logged row.
    The two action errors are mean squared errors in the units of the dataset over the same held-out windows.
    ``mean_action_mse`` is the error of always predicting the mean action of the train split. Both are None without
    held-out demos. The success rates are those of ``--rollout-every``. ``seconds`` and ``steps_per_s`` cover training
    steps, not measuring or saving. ``notes`` are lines of advice for a terminal; the JSON omits them.
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
    start_action_mse: float | None = None
    best_action_mse: float | None = None
    best_step: int | None = None
    best_checkpoint: Path | None = None
    success_rate: float | None = None
    best_success_rate: float | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, run: Path, journal: Journal, source: str, best: Best | None = None, notes: tuple[str, ...] = ()
    ) -> TrainResult:
        """Builds the result from the journal of a finished run, the names of its sources and its best checkpoint."""
        carried, metrics = journal.carried, journal.metrics
        assert carried.first_loss is not None
        assert carried.final_loss is not None
        return cls(
            run=run,
            steps=carried.step,
            seconds=carried.seconds,
            steps_per_s=carried.step / max(carried.seconds, 1e-9),
            first_loss=carried.first_loss,
            final_loss=carried.final_loss,
            valid_action_mse=metrics.get("validation/action_mse"),
            mean_action_mse=metrics.get("validation/mean_action_mse"),
            source=source,
            checkpoint=run if journal.checkpoint is None else journal.checkpoint,
            start_action_mse=metrics.get(START_ERROR),
            best_action_mse=None if best is None else best.valid_action_mse,
            best_step=None if best is None else best.step,
            best_checkpoint=None if best is None else run / CHECKPOINTS / best.name,
            success_rate=metrics.get(SUCCESS_RATE),
            best_success_rate=None if best is None else best.success_rate,
            notes=notes,
        )

    def to_json(self) -> dict[str, Any]:
        figures = {name: value for name, value in self._asdict().items() if name != "notes"}
        return {key: str(value) if isinstance(value, Path) else value for key, value in figures.items()}

    def lines(self) -> list[str]:
        """Returns the results as lines for a terminal."""
        rate = f"{self.steps_per_s:.1f} steps/s; {source_in_words(self.source)}"
        lines = [
            f"trained {counted(self.steps, 'step')} in {self.seconds:.1f} s ({rate})",
            f"loss {self.first_loss:.4g} → {self.final_loss:.4g}",
        ]
        if self.valid_action_mse is not None:
            compared = of_mean_action(self.valid_action_mse, self.mean_action_mse)
            lines.append(f"held-out action error {self.valid_action_mse:.4g}, {compared}")
        if self.success_rate is not None:
            best = "" if self.best_success_rate is None else f", {self.best_success_rate:.0%} with the best checkpoint"
            lines.append(f"success in simulation {self.success_rate:.0%} after the last step{best}")
        return [*lines, *self._verdict(), *self._checkpoints(), *self.notes]

    def _checkpoints(self) -> list[str]:
        """Returns the checkpoint with which the run acts, and the latest one if that is another."""
        if self.best_checkpoint is None or self.best_checkpoint.name == self.checkpoint.name:
            return [f"checkpoint {self.checkpoint}"]
        return [
            f"best checkpoint {self.best_checkpoint}: rollout, export and report use it",
            f"latest checkpoint {self.checkpoint}: --resume continues from it",
        ]

    def _verdict(self) -> list[str]:
        """Returns a line that says whether fine-tuning lowered the held-out action error."""
        if self.start_action_mse is None or self.valid_action_mse is None:
            return []
        before, after = f"{self.start_action_mse:.4g} before", f"{self.valid_action_mse:.4g} after"
        if self.best_step == 0:
            line = f"fine-tuning did NOT help: held-out action error {before}, {after}; the initial policy is the best"
        elif self.valid_action_mse < self.start_action_mse:
            line = f"fine-tuning helped: held-out action error {before}, {after}"
        else:
            line = f"the last step is worse than the initial policy: held-out action error {before}, {after}"
        if self.best_step not in (None, 0, self.steps):
            line += f"; this run acts with its best checkpoint, step {self.best_step} ({self.best_action_mse:.4g})"
        return [line]
