import os
import random
import signal
import time

import pytest
from cache_fakes import extract, outputs
from fakes import make_dataset
from killed import start, wait_for

from cache_pipeline.cache.manifest_store import MANIFEST
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.errors import CacheLockedError, IncompleteCacheError


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "demos.hdf5", lengths=(17, 30, 9, 21))


def test_a_run_killed_at_random_moments_ends_with_the_digests_of_one_that_was_not(dataset, tmp_path):
    out, whole = tmp_path / "killed.zarr", tmp_path / "whole.zarr"
    extract(whole, dataset, views=2)
    rng, before = random.Random(0), 0
    for _ in range(10):
        process = start(out, dataset)
        wait_for(process, out, "pending.json")
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.join()
        if not (out / MANIFEST).exists():
            with pytest.raises(IncompleteCacheError):
                FeatureCache(out)
        done = len(list(out.glob("ledger/**/*.json")))
        assert done >= before
        before = done
    extract(out, dataset, views=2)
    assert outputs(out) == outputs(whole)
    assert not list(out.rglob("*.partial"))


def test_a_second_writer_gets_an_error_that_names_the_first_and_a_dead_writer_holds_no_lock(dataset, tmp_path):
    out = tmp_path / "cache.zarr"
    process = start(out, dataset, seconds=0.2)
    wait_for(process, out, "pending.json")
    with pytest.raises(CacheLockedError, match=f"process {process.pid} on "):
        extract(out, dataset, views=2)
    process.kill()
    process.join()
    extract(out, dataset, views=2)
    assert not (tmp_path / ".cache.zarr.lock").exists()


def test_ctrl_c_ends_the_run_and_the_next_one_goes_on(dataset, tmp_path):
    out, whole = tmp_path / "stopped.zarr", tmp_path / "whole.zarr"
    process = start(out, dataset, seconds=0.05)
    wait_for(process, out, "ledger/features/*/0/0.json")
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 1
    assert not (out / MANIFEST).exists()
    assert extract(out, dataset, views=2).units_reused > 0
    extract(whole, dataset, views=2)
    assert outputs(out) == outputs(whole)
