"""Train a policy on cached features, or with live encoding: one loop, three sources."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cache_pipeline.encoders.image_encoder import ImageEncoder
from cache_pipeline.encoders.precision import resolve_precision
from cache_pipeline.files import resolved
from cache_pipeline.runs.checkpoint import Checkpoint, CheckpointFolder
from cache_pipeline.runs.folder import RunFolder, run_folder
from cache_pipeline.runs.metrics import MetricsLog, check_wandb
from cache_pipeline.runs.plateau import plateau_notes
from cache_pipeline.training.config import FinetuneConfig, SavingConfig, TrainConfig
from cache_pipeline.training.data.opening import RunData, features_precision
from cache_pipeline.training.data.sampler import Sampler
from cache_pipeline.training.data.source import Source, SplitRows
from cache_pipeline.training.evaluate import ActionError, evaluate
from cache_pipeline.training.loop import Journal, Phase, run_loop
from cache_pipeline.training.result import TrainResult
from cache_pipeline.training.run import start_run
from cache_pipeline.training.session import TrainSession, open_session
from cache_pipeline.training.update.distributed import Ranks, joined_ranks
from cache_pipeline.training.update.learner import Learner

logger = logging.getLogger("cache_pipeline")

RUNS = Path("runs")


def train(config: TrainConfig, *, progress: bool = True) -> TrainResult:
    """Trains as ``config`` asks and leaves a run folder.

    Raises:
        ConfigError: options that do not fit the data.
        DatasetError, CacheError: data that cannot be used.
        CheckpointError: the run folder exists, a run to resume does not fit, or a value is not finite any more.
        RunLockedError: another process writes the run folder.
        RunStopped: asked to stop by SIGINT or SIGTERM; the run was saved and can be resumed.
    """
    check_wandb(config.wandb)
    with joined_ranks(config.device) as ranks:
        return _train(config, ranks, progress=progress)


def _train(config: TrainConfig, ranks: Ranks, *, progress: bool) -> TrainResult:
    out = config.out if config.out is not None else default_run(config)
    with run_folder(out, resume=config.resume, overwrite=config.overwrite, writes=ranks.first) as folder:
        if begins_anew(folder, ranks) and config.resume:
            config = replace(config, resume=False)
        return _train_in(folder, config, ranks, progress=progress)


def _train_in(folder: RunFolder, config: TrainConfig, ranks: Ranks, *, progress: bool) -> TrainResult:
    run = folder.place
    session = open_session(config, run)
    ranks.check(session.sampler.batch_size)
    if session.resumed is None and ranks.first:
        start_run(folder, _run_json(session), _files(session))
    learner, source, resumed = session.learner, session.source, session.resumed
    logger.info("%s: %s source, %d windows, %s", run, source.name, len(session.splits[0]), session.device)
    measure = measurement(learner, lambda: source, session.data, session.splits[1], session.device, config.saving)
    phases = [Phase(0, config.steps, lambda: None, lambda: source)]
    return complete(folder, learner, session.sampler, phases, measure, config, resumed, ranks=ranks, progress=progress)


def begins_anew(folder: RunFolder, ranks: Ranks) -> bool:
    """Whether a run was started in the folder and saved nothing, so that all processes begin it again."""
    unsaved = ranks.any(folder.unsaved)
    if unsaved:
        logger.info("%s was started and saved no checkpoint: it begins again", folder.place)
    return unsaved


def complete(
    folder: RunFolder,
    learner: Learner,
    sampler: Sampler,
    phases: Sequence[Phase],
    measure: Callable[[], ActionError] | None,
    config: TrainConfig | FinetuneConfig,
    resumed: Checkpoint | None,
    *,
    ranks: Ranks,
    progress: bool,
    trained: bool = False,
) -> TrainResult:
    """Runs the loop to the end; the first process alone logs, measures and saves.

    Args:
        trained: the policy is a trained one, so it is measured and saved before the first step.
    """
    ranks.take_from_first(learner.model_tensors().values())
    saving, start = config.saving, 0 if resumed is None else resumed.step
    with ExitStack() as opened:
        checkpoints = CheckpointFolder(folder.path, saving.keep_best, folder.saved) if ranks.first else None
        log = opened.enter_context(MetricsLog(folder.path, start, config.wandb, folder.place)) if ranks.first else None
        journal = Journal(learner, checkpoints, log, measure, saving, steps=config.steps, resumed=resumed)
        if trained and resumed is None:
            journal.record_start()
        result = run_loop(journal, learner, sampler, phases, steps=config.steps, run=folder.place, progress=progress)
    if checkpoints is None:
        return TrainResult.of(folder.place, result, journal.metrics)
    return TrainResult.of(folder.place, result, journal.metrics, checkpoints.best, plateau_notes(folder.place))


def default_run(config: TrainConfig) -> Path:
    """``runs/<name of the cache or of the first dataset>``."""
    return RUNS / resolved(config.cache or config.datasets[0]).stem


def measurement(
    learner: Learner,
    source: Callable[[], Source],
    data: RunData,
    valid: SplitRows | None,
    device: torch.device,
    saving: SavingConfig,
) -> Any:
    """A function that measures the held-out action error; None without held-out demos."""
    if valid is None:
        return None

    def measure() -> ActionError:
        learner.policy.eval()
        try:
            return evaluate(
                learner.policy,
                source(),
                len(valid),
                data.mean_action,
                device=device,
                most=saving.eval_windows,
            )
        finally:
            learner.policy.train()

    return measure


def _run_json(session: TrainSession) -> dict[str, Any]:
    return {
        "kind": "train",
        "config": session.config.to_json(),
        "policy": session.spec.to_json(),
        "data": session.data.identity,
        "order": session.plan.order,
        "precision": _features_precision(session),
    }


def _features_precision(session: TrainSession) -> str:
    """What the run's features are computed in, so that fine-tuning can go on in it."""
    if session.plan.source == "live" or session.data.cache is None:
        return resolve_precision(session.config.precision, session.device)
    return features_precision(session.data.cache, tuple(session.data.cameras))


def _files(session: TrainSession) -> dict[str, ImageEncoder]:
    return {session.spec.encoder_files[camera]: encoder for camera, encoder in session.encoders.items()}
