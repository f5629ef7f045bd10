"""The training loop: takes planned batches, makes updates, and logs, measures and saves."""

from __future__ import annotations

import logging
import time
from contextlib import closing, nullcontext
from pathlib import Path

from cache_pipeline.errors import RunStopped
from cache_pipeline.memory import retained_memory
from cache_pipeline.progress import Progress
from cache_pipeline.training.data.source import Source, source_in_words
from cache_pipeline.training.interrupt import StopRequest, stop_request
from cache_pipeline.training.journal import Journal
from cache_pipeline.training.session import Phase, Session
from cache_pipeline.training.update.distributed import current_ranks

logger = logging.getLogger("cache_pipeline")

ESTIMATED_AFTER_S, LONG_S = 5.0, 60.0


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


def run_loop(journal: Journal, session: Session, *, run: Path, progress: bool) -> str:
    """Trains from the progress of ``journal`` to the end, together with the other processes of the run, if any.

    Returns:
        The names of the sources, such as ``resident+live``.

    Raises:
        RunStopped: a signal stopped the run; everything is saved.
        ConfigError: the loss is not finite.
    """
    start, steps, ranks = journal.carried.step, session.config.steps, current_ranks()
    names: list[str] = []
    shown_bar = Progress("train", steps, "steps", start) if progress and ranks.first else nullcontext()
    with retained_memory(), stop_request(alone=ranks.world == 1) as request, shown_bar as bar:
        for phase in session.phases():
            if phase.stop <= start or request.agreed:
                continue
            source = session.enter(phase)
            names.append(source.name)
            words, windows = source_in_words(source.name), len(session.splits[0])
            logger.info("%s: %s; %d windows, %s", run, words, windows, session.device)
            if phase.start == 0 and session.resumed is None and session.record.kind == "finetune":
                journal.record_start()
            _run_phase(journal, session, phase, source, request, bar)
        # Wait until the first process has saved: the launcher stops all processes when one exits.
        ranks.wait()
    if request.agreed and journal.carried.step < steps:
        raise RunStopped(f"saved step {journal.carried.step} of {steps} in {run}")
    return "+".join(names)


def _run_phase(
    journal: Journal, session: Session, phase: Phase, source: Source, request: StopRequest, bar: Progress | None
) -> None:
    start, stop = max(journal.carried.step, phase.start), phase.stop
    ranks, estimate = current_ranks(), Estimate(stop)
    with closing(source.batches(map(ranks.share, session.sampler.plans(start, stop)))) as batches:
        for number, batch in enumerate(batches, start):
            loss = session.learner.step(batch, number)
            request.agreed = ranks.any(request.signals > 0)
            journal.record(number + 1, loss, stopping=request.agreed)
            if bar is not None:
                bar.advance(1, loss=f"{journal.carried.final_loss:.4g}")
                if (line := estimate.after(number + 1)) is not None:
                    logger.info("%s", line)
            if request.agreed:
                return
