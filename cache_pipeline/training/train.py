"""Train a policy on cached features, or with live encoding: one loop, three sources."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cache_pipeline.encoders.image_encoder import ImageEncoder
from cache_pipeline.training.checkpoint import (
    CheckpointFolder,
)
from cache_pipeline.training.config import SavingConfig, TrainConfig
from cache_pipeline.training.data import (
    RunData,
)
from cache_pipeline.training.evaluate import ActionError, evaluate
from cache_pipeline.training.learner import Learner
from cache_pipeline.training.loop import Journal, Phase, run_loop
from cache_pipeline.training.metrics import MetricsLog
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
    run = config.out if config.out is not None else default_run(config)
    check_run_folder(run, resume=config.resume, overwrite=config.overwrite)
    session = open_session(config, run)
    if session.resumed is None:
        start_run(run, _run_json(session), _files(session))
    learner, source, resumed = session.learner, session.source, session.resumed
    logger.info("%s: %s source, %d windows, %s", run, source.name, len(session.splits[0]), session.device)
    with MetricsLog(run, 0 if resumed is None else resumed.step) as log:
        measure = measurement(learner, lambda: source, session.data, session.splits[1], session.device, config.saving)
        folder = CheckpointFolder(run, config.saving.keep_best)
        journal = Journal(learner, folder, log, measure, config.saving, steps=config.steps, resumed=resumed)
        phases = [Phase(0, config.steps, lambda: None, lambda: source)]
        result = run_loop(journal, learner, session.sampler, phases, steps=config.steps, run=run, progress=progress)
    return TrainResult.of(run, result, journal.metrics, plateau_notes(run))


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
    plan = session.plan
    return {
        "kind": "train",
        "config": session.config.to_json(),
        "policy": session.spec.to_json(),
        "data": session.data.identity,
        "order": {"views": plan.views, "blocks": None if plan.blocks is None else asdict(plan.blocks)},
    }


def _files(session: TrainSession) -> dict[str, ImageEncoder]:
    return {session.spec.encoder_files[camera]: encoder for camera, encoder in session.encoders.items()}
