import errno

import pytest
from cache_fakes import CAMERA, change_pixel, equal, extract
from fakes import make_dataset

from cache_pipeline.cache.compact import compact
from cache_pipeline.cache.integrity import check_integrity
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.cache.summary import inspect_cache
from cache_pipeline.errors import CacheError


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "demos.hdf5", lengths=(20, 5, 30), masks={})


def test_compacting_frees_dead_rows_and_keeps_every_live_bit(dataset, tmp_path):
    path = tmp_path / "cache.zarr"
    extract(path, dataset, views=2)
    change_pixel(dataset, "demo_0", CAMERA, 0)
    extract(path, dataset, views=2)
    before = FeatureCache(path)
    kept = [before.features(CAMERA, view=view) for view in (0, 1)]
    assert inspect_cache(path).dead_rows > 0
    result = compact(path)
    after = FeatureCache(path)
    assert result.bytes_after < result.bytes_before
    assert all(equal(after.features(CAMERA, view=view), kept[view]) for view in (0, 1))
    assert after.fingerprint == before.fingerprint
    assert inspect_cache(path).dead_rows == 0
    assert check_integrity(path).ok


def test_the_result_names_the_cache_as_it_was_named(dataset, tmp_path, monkeypatch):
    extract(tmp_path / "cache.zarr", dataset)
    monkeypatch.chdir(tmp_path)
    assert compact("cache.zarr").cache == "cache.zarr"
    assert check_integrity("cache.zarr").cache == "cache.zarr"


def test_a_compacted_cache_is_extended_without_encoding_again(dataset, tmp_path):
    path = tmp_path / "cache.zarr"
    extract(path, dataset)
    change_pixel(dataset, "demo_0", CAMERA, 0)
    extract(path, dataset)
    compact(path)
    assert extract(path, dataset).units_encoded == 0
    make_dataset(dataset, lengths=(4,), names=["demo_8"], masks={})
    assert extract(path, dataset).images == 2 * 4


def test_a_compaction_that_fails_leaves_the_cache_as_it_was(dataset, tmp_path, monkeypatch):
    path = tmp_path / "cache.zarr"
    extract(path, dataset)
    before = FeatureCache(path).fingerprint

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cache_pipeline.cache.compact.complete_cache", stop)
        with pytest.raises(KeyboardInterrupt):
            compact(path)
    assert check_integrity(path).ok
    compact(path)
    assert FeatureCache(path).fingerprint == before


def test_a_full_disk_says_that_the_cache_is_unchanged(dataset, tmp_path, monkeypatch):
    path = tmp_path / "cache.zarr"
    extract(path, dataset)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cache_pipeline.cache.compact.complete_cache", full)
    with pytest.raises(CacheError) as caught:
        compact(path)
    assert str(caught.value).endswith("free some space and run the same command again; the cache is unchanged")
    assert "no space left" in str(caught.value)
    assert check_integrity(path).ok
