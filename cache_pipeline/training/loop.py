"""The training loop: takes planned batches, makes updates, and logs, measures and saves."""

from __future__ import annotations

import logging
import time
from contextlib import closing, nullcontext
from pathlib import Path
from typing import NamedTuple

from cache_pipeline.errors import RunStopped
from cache_pipeline.memory import retained_memory
from cache_pipeline.progress import Progress
from cache_pipeline.training.data.source import Source, source_in_words
from cache_pipeline.training.interrupt import StopWish, stop_wish
from cache_pipeline.training.journal import Journal
from cache_pipeline.training.session import Session
from cache_pipeline.training.update.distributed import current_ranks

logger = logging.getLogger("cache_pipeline")

NOTES_EVERY_S = 0.5
ESTIMATED_AFTER_S, LONG_S = 5.0, 60.0


class LoopResult(NamedTuple):
    """Result of the loop. ``seconds`` and ``steps_per_s`` cover training steps, not measuring or saving."""

    step: int
    seconds: float
    steps_per_s: float
    first_loss: float
    final_loss: float
    checkpoint: Path
    source: str


class Estimate:
    """Estimates once, after a few steps, how long the steps up to ``stop`` will take.

    The first step is not counted: it includes kernel selection and memory allocation.
    """

    def __init__(self, stop: int) -> None:
        self._stop = stop
        self._first: tuple[int, float] | None = None
        self._said = False

    def after(self, step: int) -> str | None:
        """Returns the line after ``step`` steps if it is due and more than a minute remains, else None."""
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
        return f"{rate:.3g} steps/s: the remaining {left} steps take about {seconds / 60:.0f} min"


def run_loop(journal: Journal, session: Session, *, run: Path, progress: bool) -> LoopResult:
    """Trains from the progress of ``journal`` to the end, together with the other processes of the run, if any.

    Raises:
        RunStopped: a signal stopped the run; everything is saved.
        ConfigError: the loss is not finite.
    """
    start, steps, ranks = journal.carried.step, session.config.steps, current_ranks()
    names: list[str] = []
    shown_bar = Progress("train", steps, "steps", start) if progress and ranks.first else nullcontext()
    with retained_memory(), stop_wish(alone=ranks.world == 1) as wish, shown_bar as bar:
        for phase in session.phases():
            if phase.stop <= start or wish.heeded:
                continue
            source = session.enter(phase)
            names.append(source.name)
            words, windows = source_in_words(source.name), len(session.splits[0])
            logger.info("%s: %s; %d windows, %s", run, words, windows, session.device)
            if phase.start == 0 and session.resumed is None and session.record.kind == "finetune":
                journal.record_start()
            _run_phase(journal, session, source, max(start, phase.start), phase.stop, wish, bar)
        # Wait until the first process has saved: the launcher stops all processes when one exits.
        ranks.wait()
    carried = journal.carried
    if wish.heeded and carried.step < steps:
        raise RunStopped(f"saved step {carried.step} of {steps} in {run}")
    assert carried.first_loss is not None
    assert carried.final_loss is not None
    rate = carried.step / max(carried.seconds, 1e-9)
    saved = journal.checkpoint if journal.checkpoint is not None else run
    return LoopResult(
        carried.step, carried.seconds, rate, carried.first_loss, carried.final_loss, saved, "+".join(names)
    )


def _run_phase(
    journal: Journal, session: Session, source: Source, start: int, stop: int, wish: StopWish, bar: Progress | None
) -> None:
    shown, ranks, estimate = 0.0, current_ranks(), Estimate(stop)
    with closing(source.batches(map(ranks.share, session.sampler.plans(start, stop)))) as batches:
        for number, batch in enumerate(batches, start):
            loss = session.learner.step(batch, number)
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
