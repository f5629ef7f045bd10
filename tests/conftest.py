"""Puts this folder on the import path, so that tests share ``fakes.py``; a dataset and its cache for the engines."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Four demos of 77 frames in total."""
    from fakes import make_dataset

    return make_dataset(tmp_path_factory.mktemp("dataset") / "demos.hdf5", lengths=(17, 30, 9, 21))


@pytest.fixture(scope="session")
def whole(dataset, tmp_path_factory):
    """What extraction of ``dataset`` in two views makes in one process."""
    from cache_fakes import extract, outputs

    out = tmp_path_factory.mktemp("whole") / "whole.zarr"
    extract(out, dataset, views=2)
    return outputs(out)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "cache.zarr"
