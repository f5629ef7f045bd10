"""Small configs, a small dataset and its caches, for tests of runs and of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fakes import make_dataset

from cache_pipeline.encoders.image_encoder import EncoderSpec
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.extract.config import ExtractConfig
from cache_pipeline.extract.pipeline import extract_features
from cache_pipeline.runs.metrics import read_metrics
from cache_pipeline.training.config import SavingConfig, TrainConfig

ENCODER = EncoderSpec(weights="random")
PREPROCESS = Preprocess(imagenet_norm=False)
LENGTHS = (12, 9, 11, 10)
SMALL = {"hidden": [32, 32]}


def config(out: Path, cache: Path | None = None, **options: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "steps": 6,
        "batch_size": 8,
        "emb_dim": 16,
        "policy_options": SMALL,
        "device": "cpu",
        "precision": "fp32",
        "augment": False,
        "saving": SavingConfig(log_every=1, eval_every=3),
    }
    return TrainConfig(cache=cache, out=out, **{**defaults, **options})


def live(out: Path, dataset: Path, **options: Any) -> TrainConfig:
    return config(out, datasets=(dataset,), encoder=ENCODER, preprocess=PREPROCESS, **options)


def losses(run: Path) -> list[float]:
    return [row["training/loss"] for row in read_metrics(run) if row["training/loss"] is not None]


def extracted(dataset: Path, out: Path, **options: Any) -> Path:
    """A cache in float32 of float32 features, unless ``options`` say otherwise."""
    options = {"datasets": (dataset,), "encoders": ENCODER, "precision": "fp32", "store_dtype": "float32", **options}
    extract_features(ExtractConfig(out=out, preprocess=PREPROCESS, device="cpu", **options))
    return out


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three demos to train on and one held out; two cameras of 24×24."""
    return make_dataset(tmp_path_factory.mktemp("data") / "small.hdf5", lengths=LENGTHS)


@pytest.fixture(scope="session")
def cache(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clean view and one other, pooled features."""
    return extracted(dataset, tmp_path_factory.mktemp("cache") / "small.zarr", views=2, shard_rows=16)


@pytest.fixture(scope="session")
def frontier(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same encoder cut at layer3."""
    spec = EncoderSpec(weights="random", cut="layer3")
    return extracted(dataset, tmp_path_factory.mktemp("frontier") / "layer3.zarr", encoders=spec)
