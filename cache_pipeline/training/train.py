"""Train a policy on cached features, or with live encoding: one loop, three sources."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from cache_pipeline.encoders.image_encoder import ImageEncoder
from cache_pipeline.encoders.precision import resolve_precision
from cache_pipeline.training.checkpoint import Checkpoint, CheckpointFolder
from cache_pipeline.training.config import FinetuneConfig, SavingConfig, TrainConfig
from cache_pipeline.training.data import RunData, features_precision
from cache_pipeline.training.distributed import Ranks, joined_ranks
from cache_pipeline.training.evaluate import ActionError, evaluate
from cache_pipeline.training.learner import Learner
from cache_pipeline.training.loop import Journal, Phase, run_loop
from cache_pipeline.training.metrics import MetricsLog, check_wandb
from cache_pipeline.training.order import Sampler
from cache_pipeline.training.plateau import plateau_notes
from cache_pipeline.training.result import TrainResult
from cache_pipeline.training.run import check_run_folder, start_run
from cache_pipeline.training.session import TrainSession, open_session
from cache_pipeline.training.sources.source import Source, SplitRows

logger = logging.getLogger("cache_pipeline")

RUNS = Path("runs")


def train(config: TrainConfig, *, progress: bool = True) -> TrainResult:
    """Trains as ``config`` asks and leaves a run folder.

    Raises:
        ConfigError: options that do not fit the data.
        DatasetError, CacheError: data that cannot be used.
        CheckpointError: the run folder exists, or a run to resume does not fit.
        KeyboardInterrupt: asked to stop by SIGINT or SIGTERM; the run was saved and can be resumed.
    """
    check_wandb(config.wandb)
    with joined_ranks(config.device) as ranks:
        return _train(config, ranks, progress=progress)


def _train(config: TrainConfig, ranks: Ranks, *, progress: bool) -> TrainResult:
    run = config.out if config.out is not None else default_run(config)
    if ranks.first:
        check_run_folder(run, resume=config.resume, overwrite=config.overwrite)
    session = open_session(config, run)
    ranks.check(session.sampler.batch_size)
    if session.resumed is None and ranks.first:
        start_run(run, _run_json(session), _files(session))
    learner, source, resumed = session.learner, session.source, session.resumed
    logger.info("%s: %s source, %d windows, %s", run, source.name, len(session.splits[0]), session.device)
    measure = measurement(learner, lambda: source, session.data, session.splits[1], session.device, config.saving)
    phases = [Phase(0, config.steps, lambda: None, lambda: source)]
    return complete(run, learner, session.sampler, phases, measure, config, resumed, ranks=ranks, progress=progress)


def complete(
    run: Path,
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
        folder = CheckpointFolder(run, saving.keep_best) if ranks.first else None
        log = opened.enter_context(MetricsLog(run, start, config.wandb)) if ranks.first else None
        journal = Journal(learner, folder, log, measure, saving, steps=config.steps, resumed=resumed)
        if trained and resumed is None:
            journal.record_start()
        result = run_loop(journal, learner, sampler, phases, steps=config.steps, run=run, progress=progress)
    if folder is None:
        return TrainResult.of(run, result, journal.metrics)
    return TrainResult.of(run, result, journal.metrics, folder.best, plateau_notes(run))


def default_run(config: TrainConfig) -> Path:
    """``runs/<name of the cache or of the first dataset>``."""
    return RUNS / (config.cache or config.datasets[0]).stem


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
