"""Train a policy on cached features, or with live encoding: one loop, three sources."""

from __future__ import annotations

from cache_pipeline.training.config import TrainConfig
from cache_pipeline.training.result import TrainResult


def train(config: TrainConfig, *, progress: bool = True) -> TrainResult:
    """Trains as ``config`` asks and leaves a run folder.

    Raises:
        ConfigError: options that do not fit the data.
        DatasetError, CacheError: data that cannot be used.
        CheckpointError: the run folder exists, or a run to resume does not fit.
    """
    raise NotImplementedError
