"""A small dataset and its caches, made once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import make_dataset
from training_runs import extracted

from cache_pipeline.encoders.image_encoder import EncoderSpec

LENGTHS = (12, 9, 11, 10)


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
