"""Long tests of caches on an object store: `uv run pytest -m stress tests/stress/test_stress_remote.py -s`."""

import logging
import os
import random

import pytest
from cache_fakes import extract, outputs
from fakes import make_dataset
from killed import CONTEXT
from object_store import BUCKET, KEYS, s3_server

from cache_pipeline.cache.compact import compact
from cache_pipeline.cache.integrity import check_integrity
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.errors import CacheError

pytestmark = [pytest.mark.stress, pytest.mark.timeout(7200), pytest.mark.filterwarnings("default")]

KILLS = int(os.environ.get("STRESS_REMOTE_KILLS", "20"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("stress") / "demos.hdf5", lengths=(17, 30, 9, 21))


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "whole.zarr"
    extract(out, dataset, views=2)
    return outputs(out)


@pytest.fixture(scope="module")
def server():
    """The environment of processes, and the faults: they hold in every test."""
    with s3_server() as (endpoint, faults), pytest.MonkeyPatch.context() as patch:
        environment = {**KEYS, "AWS_ENDPOINT_URL": endpoint}
        for name, value in environment.items():
            patch.setenv(name, value)
        faults.refused, faults.slow, faults.dropped = 0.05, 0.02, 0.03
        yield environment


def work(environment, url, dataset, replace):
    logging.getLogger("cache_pipeline").setLevel(logging.ERROR)
    os.environ.update(environment)
    if replace:
        compact(url)
    else:
        extract(url, dataset, views=2)


def killed(environment, url, dataset, seconds, *, replace=False):
    """Whether the process still ran when it was killed."""
    process = CONTEXT.Process(target=work, args=(environment, url, dataset, replace))
    process.start()
    process.join(seconds)
    alive = process.is_alive()
    process.kill()
    process.join()
    return alive


def check_whole(url, whole):
    assert outputs(url) == whole
    assert check_integrity(url).ok


def test_a_writer_killed_at_any_moment_changes_no_digest(server, dataset, whole):
    rng, alive, number = random.Random(0), 0, 0
    for _ in range(KILLS):
        alive += killed(server, f"s3://{BUCKET}/kill/{number}.zarr", dataset, rng.uniform(0.2, 6.0))
        if rng.random() < 0.4:  # otherwise the next process goes on where this one died
            extract(f"s3://{BUCKET}/kill/{number}.zarr", dataset, views=2)
            check_whole(f"s3://{BUCKET}/kill/{number}.zarr", whole)
            number += 1
    extract(f"s3://{BUCKET}/kill/{number}.zarr", dataset, views=2)
    check_whole(f"s3://{BUCKET}/kill/{number}.zarr", whole)
    print(f"{KILLS} writers killed, {alive} while they ran; {number + 1} caches completed")
    assert alive > 0


def test_a_compaction_killed_at_any_moment_loses_nothing(server, dataset):
    rng, alive = random.Random(1), 0
    url = f"s3://{BUCKET}/compact/lift.zarr"
    extract(url, dataset, views=2)
    fewer = dataset.with_name("fewer.hdf5")
    make_dataset(fewer, lengths=(17, 30))
    extract(url, fewer, views=2)
    features = {camera: FeatureCache(url).features(camera).tobytes() for camera in FeatureCache(url).cameras}
    for _ in range(KILLS):
        alive += killed(server, url, dataset, rng.uniform(0.1, 4.0), replace=True)
        try:
            cache = FeatureCache(url)
        except CacheError:  # it says that the cache is being replaced; the next command finishes that
            compact(url)
            cache = FeatureCache(url)
        assert {camera: cache.features(camera).tobytes() for camera in cache.cameras} == features
        extract(url, dataset, views=2)
        extract(url, fewer, views=2)
    assert check_integrity(url).ok
    print(f"{KILLS} compactions killed, {alive} while they ran")
    assert alive > 0
