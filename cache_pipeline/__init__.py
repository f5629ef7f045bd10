"""Train robot policies on frozen image features that are computed once and kept in a cache that can be trusted.

The names below are the public interface; docs/api.md has an example of each. Each is imported when it is first used, so
that ``import cache_pipeline`` takes milliseconds. Everything else in the package is internal and may change.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cache_pipeline.cache.reader import FeatureCache as FeatureCache
    from cache_pipeline.demos.dataset import Dataset as Dataset
    from cache_pipeline.encoders.image_encoder import EncoderSpec as EncoderSpec
    from cache_pipeline.encoders.obs_encoder import MultiImageObsEncoder as MultiImageObsEncoder
    from cache_pipeline.encoders.preprocess import Preprocess as Preprocess
    from cache_pipeline.encoders.resnet import get_resnet as get_resnet
    from cache_pipeline.errors import CachePipelineError as CachePipelineError
    from cache_pipeline.errors import CheckpointError as CheckpointError
    from cache_pipeline.errors import ConfigError as ConfigError
    from cache_pipeline.errors import CorruptCacheError as CorruptCacheError
    from cache_pipeline.errors import DatasetError as DatasetError
    from cache_pipeline.errors import EncoderError as EncoderError
    from cache_pipeline.errors import IncompleteCacheError as IncompleteCacheError
    from cache_pipeline.errors import StaleCacheError as StaleCacheError
    from cache_pipeline.extract.config import ExtractConfig as ExtractConfig
    from cache_pipeline.extract.pipeline import extract_features as extract_features
    from cache_pipeline.extract.verify import verify as verify
    from cache_pipeline.runs.policy import load_policy as load_policy
    from cache_pipeline.sim.config import RolloutConfig as RolloutConfig
    from cache_pipeline.sim.rollout import rollout as rollout
    from cache_pipeline.training.config import FinetuneConfig as FinetuneConfig
    from cache_pipeline.training.config import TrainConfig as TrainConfig
    from cache_pipeline.training.data.window_dataset import WindowDataset as WindowDataset
    from cache_pipeline.training.finetune import finetune as finetune
    from cache_pipeline.training.train import train as train

_MODULES = {
    "FeatureCache": "cache.reader",
    "Dataset": "demos.dataset",
    "EncoderSpec": "encoders.image_encoder",
    "MultiImageObsEncoder": "encoders.obs_encoder",
    "Preprocess": "encoders.preprocess",
    "get_resnet": "encoders.resnet",
    "CachePipelineError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "CorruptCacheError": "errors",
    "DatasetError": "errors",
    "EncoderError": "errors",
    "IncompleteCacheError": "errors",
    "StaleCacheError": "errors",
    "ExtractConfig": "extract.config",
    "extract_features": "extract.pipeline",
    "verify": "extract.verify",
    "RolloutConfig": "sim.config",
    "rollout": "sim.rollout",
    "load_policy": "runs.policy",
    "FinetuneConfig": "training.config",
    "TrainConfig": "training.config",
    "WindowDataset": "training.data.window_dataset",
    "finetune": "training.finetune",
    "train": "training.train",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
