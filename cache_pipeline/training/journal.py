"""Logs, measures and saves a run at its intervals."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cache_pipeline.errors import CheckpointError, ConfigError
from cache_pipeline.files import typed
from cache_pipeline.runs.checkpoint import PER_DIM, SUCCESS_RATE, Checkpoint, CheckpointFolder, Score
from cache_pipeline.runs.metrics import MetricsLog
from cache_pipeline.sim.results import RolloutResult
from cache_pipeline.training.session import Session

logger = logging.getLogger("cache_pipeline")

START_ERROR = "validation/start_action_mse"  # only for a run that starts from a trained policy


class Carried(NamedTuple):
    """Progress that a checkpoint stores, so that a resumed run continues from it."""

    step: int = 0
    seconds: float = 0.0
    first_loss: float | None = None
    final_loss: float | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Carried:
        """Reads the progress from ``checkpoint``; raises CheckpointError if it is damaged."""
        defaults = cls()._asdict()
        try:
            progress: Carried = typed([{**defaults, **checkpoint.progress}[name] for name in defaults], cls)
            if progress.step != checkpoint.step:
                raise ValueError(f"its progress is that of step {progress.step}, not {checkpoint.step}")
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.path} cannot be resumed: {error}") from error
        return progress


class Journal:
    """Logs, measures and saves, each at its interval of steps.

    Args:
        folder, log: outputs for checkpoints and metrics; None in a process that does not write.
        roll: makes the rollouts of ``--rollout-every``.

    Attributes:
        carried: progress up to the last row of metrics.
        metrics: the latest value of each metric.
        checkpoint: the last one that was saved.
    """

    def __init__(
        self,
        session: Session,
        folder: CheckpointFolder | None,
        log: MetricsLog | None,
        roll: Callable[[], RolloutResult] | None = None,
    ) -> None:
        self._session, self._folder, self._log, self._roll = session, folder, log, roll
        self._learner, self._saving, self._steps = session.learner, session.config.saving, session.config.steps
        self._losses: list[Tensor] = []
        resumed = session.resumed
        self.carried = Carried() if resumed is None else Carried.of(resumed)
        self.metrics: dict[str, Any] = {} if resumed is None else dict(resumed.metrics)
        self._begun, self._since = time.perf_counter(), self.carried.step
        self.checkpoint = None if resumed is None else resumed.path
        best = None if folder is None else folder.best
        if best is not None and best.success_rate is not None and not self._saving.rollout_every:
            logger.warning(
                "the best checkpoint of this run was chosen by success in rollouts; without --rollout-every no later "
                "one replaces it"
            )

    def record(self, step: int, loss: Tensor, *, stopping: bool) -> None:
        """Records the loss of update ``step``, counted from 1; then logs, measures and saves if due."""
        self._losses.append(loss)
        last = step == self._steps or stopping
        measured = self._due(step, self._saving.eval_every) or (step == self._steps)
        rolled = self._due(step, self._saving.rollout_every) or (step == self._steps and self._saving.rollout_every > 0)
        saved = self._due(step, self._saving.save_every) or last
        if last or measured or rolled or saved or step == 1 or step % self._saving.log_every == 0:
            self._write_row(step)
        if self._folder is not None and (measured or rolled or saved):
            with self._clock_stopped():
                score = self._score(self._folder, step, rolled=rolled) if measured or rolled else None
                if saved or (score is not None and self._folder.is_among_best(score)):
                    self.checkpoint = self._save(self._folder, step, score)

    def record_start(self) -> None:
        """Measures and saves the initial policy of a fine-tuning run, so that it can be the best checkpoint."""
        rolled = self._saving.rollout_every > 0
        if self._folder is None or not (self._session.measurable or rolled):
            return
        with self._clock_stopped():
            score = self._score(self._folder, 0, rolled=rolled)
            self.metrics[START_ERROR] = self.metrics.get("validation/action_mse")
            if score is not None and self._folder.is_among_best(score):
                self.checkpoint = self._save(self._folder, 0, score)

    def _save(self, folder: CheckpointFolder, step: int, score: Score | None) -> Path:
        rolled = score is not None and score.success is not None
        metrics = {name: value for name, value in self.metrics.items() if rolled or not name.startswith("rollout/")}
        return folder.save(step, self._learner.state(), metrics, self.carried._asdict(), score)

    def _score(self, folder: CheckpointFolder, step: int, *, rolled: bool) -> Score | None:
        """Measures the policy. With ``--rollout-every`` only a step with rollouts has a score."""
        error = self._evaluate(folder, step)
        if not rolled:
            return None if self._saving.rollout_every or error is None else Score(error)
        assert self._roll is not None
        with self._learner.averaged():
            result = self._roll()
        values = {SUCCESS_RATE: result.success_rate, "rollout/episodes": float(result.episodes)}
        self.metrics.update(values)
        self._write(step, values)
        logger.info("step %d: %s", step, result.lines()[0])
        return Score(error, result.success_rate)

    def _due(self, step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def _write_row(self, step: int) -> None:
        loss = float(torch.stack(self._losses).mean())
        self._losses.clear()
        if not math.isfinite(loss):
            kept = "" if self._folder is None else f"; {self._folder.kept()}"
            raise ConfigError(f"the loss is {loss} at step {step}{kept}; lower --lr, or check the actions with inspect")
        now = time.perf_counter()
        seconds = self.carried.seconds + now - self._begun
        rate = (step - self._since) / max(now - self._begun, 1e-9)
        self._begun, self._since = now, step
        first = loss if self.carried.first_loss is None else self.carried.first_loss
        self.carried = Carried(step, seconds, first, loss)
        values = {"training/loss": loss, **self._learner.rates(), "time/seconds": seconds, "time/steps_per_s": rate}
        self.metrics.update(values)
        self._write(step, values)

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if self._log is not None:
            self._log.write(step, values)

    def _evaluate(self, folder: CheckpointFolder, step: int) -> float | None:
        if not self._session.measurable:
            return None
        folder.check_finite(step, self._learner.state())
        with self._learner.averaged():
            error = self._session.measure()
        if not math.isfinite(error.mse):
            raise ConfigError(
                f"the held-out action error is {error.mse} at step {step}; {folder.kept()}; lower --lr, or check the "
                f"actions with inspect"
            )
        values = {"validation/action_mse": error.mse, "validation/mean_action_mse": error.mean_action_mse}
        self.metrics.update(values, **{PER_DIM: list(error.mse_per_dim)})
        self._write(step, values)
        loss = "" if self.carried.final_loss is None else f"loss {self.carried.final_loss:.4g}, "
        logger.info(
            "step %d: %sheld-out action error %.4g (mean action %.4g)", step, loss, error.mse, error.mean_action_mse
        )
        return error.mse

    @contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        stopped = time.perf_counter()
        yield
        self._begun += time.perf_counter() - stopped
