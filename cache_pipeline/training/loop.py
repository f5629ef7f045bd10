"""The one training loop: plans in, updates out; logged, measured and saved on the way."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cache_pipeline.errors import CheckpointError, ConfigError, RunStopped
from cache_pipeline.memory import retained_memory
from cache_pipeline.progress import Progress
from cache_pipeline.runs.checkpoint import Checkpoint, CheckpointFolder
from cache_pipeline.runs.metrics import MetricsLog
from cache_pipeline.training.config import SavingConfig
from cache_pipeline.training.data.sampler import Sampler
from cache_pipeline.training.data.source import Source
from cache_pipeline.training.evaluate import ActionError
from cache_pipeline.training.interrupt import StopWish, stop_wish
from cache_pipeline.training.update.distributed import current_ranks
from cache_pipeline.training.update.learner import Learner

logger = logging.getLogger("cache_pipeline")

NOTES_EVERY_S = 0.5
START_ERROR = "validation/start_action_mse"  # of a run that begins with a trained policy
ESTIMATED_AFTER_S, LONG_S = 5.0, 60.0


class Phase(NamedTuple):
    """Steps ``start`` to ``stop`` with one source.

    Attributes:
        begin: called before the first of these steps, also when a run is resumed among them.
        open: makes the source.
    """

    start: int
    stop: int
    begin: Callable[[], None]
    open: Callable[[], Source]


class Carried(NamedTuple):
    """What a run carries over a stop."""

    step: int = 0
    seconds: float = 0.0
    first_loss: float | None = None
    final_loss: float | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Carried:
        """What ``checkpoint`` was saved with; raises CheckpointError if it is not that."""
        try:
            return cls(**checkpoint.progress)
        except TypeError as error:
            raise CheckpointError(f"{checkpoint.path} cannot be resumed: {error}") from error


class LoopResult(NamedTuple):
    """Where the loop ended. ``seconds`` and ``steps_per_s`` count training steps, not measuring and saving."""

    step: int
    seconds: float
    steps_per_s: float
    first_loss: float
    final_loss: float
    checkpoint: Path
    source: str


class Journal:
    """Logs, measures and saves after the steps at which each is due.

    Args:
        folder, log: where checkpoints and figures go; None in a process that does not write.
        measure: the held-out action error with the averaged weights; None without held-out demos.
        resumed: the checkpoint from which the run goes on.
    """

    def __init__(
        self,
        learner: Learner,
        folder: CheckpointFolder | None,
        log: MetricsLog | None,
        measure: Callable[[], ActionError] | None,
        saving: SavingConfig,
        *,
        steps: int,
        resumed: Checkpoint | None = None,
    ) -> None:
        self._learner, self._folder, self._log, self._measure = learner, folder, log, measure
        self._saving, self._steps = saving, steps
        self._losses: list[Tensor] = []
        self._carried = Carried() if resumed is None else Carried.of(resumed)
        self.metrics: dict[str, Any] = {} if resumed is None else dict(resumed.metrics)
        self._begun, self._since = time.perf_counter(), self._carried.step
        self.checkpoint = None if resumed is None else resumed.path

    @property
    def carried(self) -> Carried:
        return self._carried

    def record(self, step: int, loss: Tensor, *, stopping: bool) -> None:
        """Takes the loss of the update that was number ``step``, counted from 1, and does what is due."""
        self._losses.append(loss)
        last = step == self._steps or stopping
        measured = self._due(step, self._saving.eval_every) or (step == self._steps)
        saved = self._due(step, self._saving.save_every) or last
        if last or measured or saved or step == 1 or step % self._saving.log_every == 0:
            self._write_row(step)
        if self._folder is not None and (measured or saved):
            with self._clock_stopped():
                error = self._evaluate(self._folder, step) if measured else None
                if saved or (error is not None and self._folder.is_among_best(error)):
                    self.checkpoint = self._folder.save(
                        step, self._learner, self.metrics, self._carried._asdict(), error
                    )

    def record_start(self) -> None:
        """Measures and saves the policy as it is before its first step, so that it counts among the best."""
        if self._folder is None or self._measure is None:
            return
        with self._clock_stopped():
            error = self._evaluate(self._folder, 0)
            self.metrics[START_ERROR] = error
            if error is not None and self._folder.is_among_best(error):
                self.checkpoint = self._folder.save(0, self._learner, self.metrics, self._carried._asdict(), error)

    def _due(self, step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def _write_row(self, step: int) -> None:
        loss = float(torch.stack(self._losses).mean())
        self._losses.clear()
        if not math.isfinite(loss):
            kept = "" if self._folder is None else f"; {self._folder.kept()}"
            raise ConfigError(
                f"the loss is {loss} at step {step}{kept}; lower --lr, or look at the actions with inspect"
            )
        now = time.perf_counter()
        seconds = self._carried.seconds + now - self._begun
        rate = (step - self._since) / max(now - self._begun, 1e-9)
        self._begun, self._since = now, step
        first = loss if self._carried.first_loss is None else self._carried.first_loss
        self._carried = Carried(step, seconds, first, loss)
        values = {"training/loss": loss, "time/seconds": seconds, "time/steps_per_s": rate}
        self.metrics.update(values)
        self._write(step, values)

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if self._log is not None:
            self._log.write(step, values)

    def _evaluate(self, folder: CheckpointFolder, step: int) -> float | None:
        if self._measure is None:
            return None
        folder.check_finite(
            step, {"the weights": self._learner.model_tensors(), "their average": self._learner.ema_tensors()}
        )
        with self._learner.averaged():
            error = self._measure()
        if not math.isfinite(error.mse):
            raise ConfigError(
                f"the held-out action error is {error.mse} at step {step}; {folder.kept()}; lower --lr, or look at the "
                f"actions with inspect"
            )
        values = {"validation/action_mse": error.mse, "validation/mean_action_mse": error.mean_action_mse}
        self.metrics.update(values, **{"validation/action_mse_per_dim": list(error.mse_per_dim)})
        self._write(step, values)
        loss = "" if self._carried.final_loss is None else f"loss {self._carried.final_loss:.4g}, "
        logger.info(
            "step %d: %sheld-out action error %.4g (mean action %.4g)", step, loss, error.mse, error.mean_action_mse
        )
        return error.mse

    @contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        stopped = time.perf_counter()
        yield
        self._begun += time.perf_counter() - stopped


class Estimate:
    """Says once how long the steps up to ``stop`` will take, when a few of them have been made.

    The first step is not counted: kernels are chosen and memory is allocated in it.
    """

    def __init__(self, stop: int) -> None:
        self._stop = stop
        self._first: tuple[int, float] | None = None
        self._said = False

    def after(self, step: int) -> str | None:
        """One line after ``step`` steps if it is due and more than a minute is left, else None."""
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
        first, begun = self._first
        if self._said or step == first or now - begun < ESTIMATED_AFTER_S:
            return None
        self._said = True
        rate, left = (step - first) / (now - begun), self._stop - step
        seconds = left / rate
        if seconds < LONG_S:
            return None
        return f"{rate:.3g} steps/s: the {left} steps that are left take about {seconds / 60:.0f} min"


def run_loop(
    journal: Journal,
    learner: Learner,
    sampler: Sampler,
    phases: Sequence[Phase],
    *,
    steps: int,
    run: Path,
    progress: bool,
) -> LoopResult:
    """Trains from where ``journal`` stands to ``steps``, together with the other processes of the run if there are any.

    Raises:
        RunStopped: somebody asked to stop; everything is saved.
        ConfigError: the loss is not finite any more.
    """
    start, ranks = journal.carried.step, current_ranks()
    name = ""
    shown_bar = Progress("train", steps, "steps", start) if progress and ranks.first else nullcontext()
    with retained_memory(), stop_wish(alone=ranks.world == 1) as wish, shown_bar as bar:
        for phase in phases:
            if phase.stop <= start or wish.heeded:
                continue
            phase.begin()
            source = phase.open()
            name = source.name if not name else f"{name}+{source.name}"
            _run_phase(journal, learner, sampler, source, max(start, phase.start), phase.stop, wish, bar)
        # Until the first process has saved: what started the processes ends all of them when one is gone.
        ranks.wait()
    carried = journal.carried
    if wish.heeded and carried.step < steps:
        raise RunStopped(f"saved step {carried.step} of {steps} in {run}")
    assert carried.first_loss is not None
    assert carried.final_loss is not None
    rate = carried.step / max(carried.seconds, 1e-9)
    return LoopResult(
        carried.step,
        carried.seconds,
        rate,
        carried.first_loss,
        carried.final_loss,
        journal.checkpoint if journal.checkpoint is not None else run,
        name,
    )


def _run_phase(
    journal: Journal,
    learner: Learner,
    sampler: Sampler,
    source: Source,
    start: int,
    stop: int,
    wish: StopWish,
    bar: Progress | None,
) -> None:
    shown, ranks = 0.0, current_ranks()
    estimate = Estimate(stop)
    with closing(source.batches(map(ranks.share, sampler.plans(start, stop)))) as batches:
        for number, batch in enumerate(batches, start):
            loss = learner.step(batch, number)
            wish.heeded = ranks.any(wish.requested)
            if bar is not None and (line := estimate.after(number + 1)) is not None:
                logger.info("%s", line)
            journal.record(number + 1, loss, stopping=wish.heeded)
            if bar is not None:
                now = time.monotonic()
                notes = {} if now - shown < NOTES_EVERY_S else {"loss": f"{journal.carried.final_loss:.4g}"}
                shown = now if notes else shown
                bar.advance(1, **notes)
            if wish.heeded:
                return
