"""Trains a session to the end in a run folder, alone or with the other processes of torchrun."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from cache_pipeline.errors import CheckpointError, described
from cache_pipeline.runs.checkpoint import CheckpointFolder
from cache_pipeline.runs.folder import RunFolder, run_folder
from cache_pipeline.runs.metrics import MetricsLog, check_wandb
from cache_pipeline.runs.plateau import plateau_notes
from cache_pipeline.runs.record import read_record, write_record
from cache_pipeline.sim.results import RolloutResult
from cache_pipeline.training.config import FinetuneConfig, TrainConfig
from cache_pipeline.training.journal import Journal
from cache_pipeline.training.loop import run_loop
from cache_pipeline.training.result import TrainResult
from cache_pipeline.training.rollouts import rollouts_of
from cache_pipeline.training.session import Session
from cache_pipeline.training.update.distributed import Ranks, joined_ranks

logger = logging.getLogger("cache_pipeline")

Config = TypeVar("Config", TrainConfig, FinetuneConfig)


def run_session(
    config: Config, out: Path, open_session: Callable[[Config, Path], Session], *, progress: bool
) -> TrainResult:
    """Opens a session and trains it to the end in the run folder ``out``, with the other processes under torchrun."""
    check_wandb(config.wandb)
    with joined_ranks(config.device) as ranks:
        if config.batch_size is not None:
            ranks.check(config.batch_size)
        with run_folder(out, resume=config.resume, overwrite=config.overwrite, writes=ranks.first) as folder:
            if _begins_anew(folder, ranks) and config.resume:
                config = replace(config, resume=False)
            session = open_session(config, folder.place)
            ranks.check(session.sampler.batch_size)
            return _complete(folder, session, ranks, progress=progress)


def _begins_anew(folder: RunFolder, ranks: Ranks) -> bool:
    """Whether the run in the folder has no checkpoint, so that all processes must start it again."""
    unsaved = ranks.any(folder.unsaved)
    if unsaved:
        logger.info("%s has saved no checkpoint; it starts again from step 0", folder.place)
    return unsaved


def _complete(folder: RunFolder, session: Session, ranks: Ranks, *, progress: bool) -> TrainResult:
    """Runs the loop to the end; only the first process logs, measures and saves."""
    saving = session.config.saving
    with ExitStack() as opened:
        roll = None
        if ranks.first and saving.rollout_every:
            roll = opened.enter_context(rollouts_of(session, folder.place))
        return _run(folder, session, ranks, roll, progress=progress)


def _run(
    folder: RunFolder, session: Session, ranks: Ranks, roll: Callable[[], RolloutResult] | None, *, progress: bool
) -> TrainResult:
    if ranks.first:
        _write(folder, session)
    ranks.take_from_first(session.learner.state().model.values())
    step = 0 if session.resumed is None else session.resumed.step
    saving = session.config.saving
    with ExitStack() as opened:
        checkpoints = log = None
        if ranks.first:
            checkpoints = CheckpointFolder(folder.path, saving.keep_best, folder.saved)
            log = opened.enter_context(MetricsLog(folder.path, step, session.config.wandb, folder.place))
        journal = Journal(session, checkpoints, log, roll)
        source = run_loop(journal, session, run=folder.place, progress=progress)
    if checkpoints is None:
        return TrainResult.of(folder.place, journal, source)
    return TrainResult.of(folder.place, journal, source, checkpoints.best, plateau_notes(folder.place))


def _write(folder: RunFolder, session: Session) -> None:
    """Creates the run folder, or records the new length of a resumed run."""
    if session.resumed is None:
        folder.start(session.record, session.files)
        return
    try:
        if read_record(folder.path).steps != session.record.steps:
            write_record(session.record, folder.path)
    except OSError as error:
        raise CheckpointError(f"cannot write the run folder {folder.place} ({described(error)})") from error
