"""Go on from a run with a live encoder that learns."""

from __future__ import annotations

from cache_pipeline.training.config import FinetuneConfig
from cache_pipeline.training.result import TrainResult


def finetune(config: FinetuneConfig, *, progress: bool = True) -> TrainResult:
    """Fine-tunes as ``config`` asks and leaves a run folder of its own.

    Raises:
        ConfigError: options that do not fit the run, or a layer that does not exist.
        DatasetError, CacheError: data that cannot be used.
        CheckpointError: a run that is damaged or does not fit the data, or whose first live loss is not the cached one.
    """
    raise NotImplementedError
