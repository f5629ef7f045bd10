"""A cache that changes while it is open: a read gives what was opened, or StaleCacheError."""

import pickle
import shutil
from threading import Thread

import numpy as np
import pytest
from cache_fakes import CAMERA, OTHER, OTHER_WEIGHTS, change_pixel, equal, extract
from fakes import make_dataset

from cache_pipeline.cache import arrays
from cache_pipeline.cache.compact import compact
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.errors import CacheError, CorruptCacheError, StaleCacheError

NAMES = [f"demo_{number}" for number in range(4)]


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "demos.hdf5", lengths=(20, 16, 16, 20), names=NAMES)


@pytest.fixture
def path(tmp_path, dataset):
    """A cache with dead rows: its first demo has left."""
    extract(tmp_path / "cache.zarr", dataset)
    make_dataset(dataset, lengths=(16, 16, 20), names=NAMES[1:])
    extract(tmp_path / "cache.zarr", dataset)
    return tmp_path / "cache.zarr"


READS = {
    "features": lambda cache: cache.features(CAMERA),
    "rows": lambda cache: cache.features(CAMERA, np.array([40, 21])),
    "slice": lambda cache: cache.array("actions", slice(20, 36)),
    "views": lambda cache: cache.views(OTHER),
    "digests": lambda cache: cache.frame_digests(CAMERA),
    "encoder": lambda cache: cache.encoder_file(CAMERA),
}


def replaced(path, dataset, how):
    if how == "compacted":
        compact(path)
    elif how == "made anew":
        extract(path, dataset, encoders=OTHER_WEIGHTS, overwrite=True)
    elif how == "compacted twice":
        compact(path)
        shutil.copytree(path, path.with_name("again"))
        shutil.rmtree(path)
        path.with_name("again").rename(path)
    else:
        path.rename(path.with_name("elsewhere"))


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("how", ["compacted", "compacted twice", "made anew", "moved away"])
def test_every_read_after_a_swap_is_refused(path, dataset, how, used):
    cache = FeatureCache(path)
    if used:
        for read in READS.values():
            read(cache)
    replaced(path, dataset, how)
    for read in READS.values():
        with pytest.raises(StaleCacheError, match=r"while .*cache\.zarr was open"):
            read(cache)
    if how != "moved away":
        FeatureCache(path).features(CAMERA)


def test_a_swap_in_the_middle_of_a_read_is_noticed(path, dataset, monkeypatch):
    cache, real = FeatureCache(path), arrays.StoredArray._read_piece
    once = iter([True])

    def swapping(self, piece):
        if next(once, False):
            compact(path)
        real(self, piece)

    monkeypatch.setattr(arrays.StoredArray, "_read_piece", swapping)
    with pytest.raises(StaleCacheError, match="layout is '72 rows' in the cache and '52 rows' now"):
        cache.features(CAMERA)


def test_an_extension_of_any_kind_leaves_an_open_cache_readable(path, dataset):
    cache = FeatureCache(path)
    wanted = {name: read(cache) for name, read in READS.items()}
    for lengths, names, options in (
        ((16, 16, 20, 9), [*NAMES[1:], "demo_9"], {}),
        ((16, 16, 20, 9), [*NAMES[1:], "demo_9"], {"views": 2}),
        ((16, 16, 20, 9), [*NAMES[1:], "demo_9"], {"low_dim_keys": ("object", "robot0_eef_pos")}),
        ((16, 20), [NAMES[1], NAMES[3]], {}),
    ):
        make_dataset(dataset, lengths=lengths, names=names)
        extract(path, dataset, **options)
        for name, read in READS.items():
            assert read(cache) == wanted[name] if name == "encoder" else equal(read(cache), wanted[name])
        assert [demo.name for demo in cache.demos] == NAMES[1:]


def test_an_open_cache_reads_on_while_another_thread_extends_it(path, dataset):
    cache, failures = FeatureCache(path), []
    wanted = cache.features(CAMERA)

    def read():
        while writer.is_alive():
            if not equal(cache.features(CAMERA), wanted):
                failures.append("other features")

    def write():
        for number in range(3):
            change_pixel(dataset, "demo_3", CAMERA, number)
            extract(path, dataset)

    writer, reader = Thread(target=write), Thread(target=read)
    writer.start()
    reader.start()
    writer.join()
    reader.join()
    assert not failures
    assert FeatureCache(path).fingerprint != cache.fingerprint


def test_compacting_what_has_no_dead_rows_disturbs_nobody(tmp_path, dataset):
    extract(tmp_path / "whole.zarr", dataset)
    cache = FeatureCache(tmp_path / "whole.zarr")
    wanted = cache.features(CAMERA)
    compact(tmp_path / "whole.zarr")
    assert equal(cache.features(CAMERA), wanted)


def test_a_pickled_cache_knows_what_was_opened(path):
    cache = FeatureCache(path)
    again = pickle.loads(pickle.dumps(cache))
    assert equal(again.features(CAMERA), cache.features(CAMERA))
    compact(path)
    with pytest.raises(StaleCacheError):
        again.features(CAMERA)


def test_damage_is_still_told_as_damage(path):
    cache = FeatureCache(path)
    (path / "actions/c/1/0").unlink()
    with pytest.raises(CorruptCacheError, match="is missing"):
        cache.array("actions")


def test_boolean_masks_choose_rows_and_other_rows_are_refused(path):
    cache = FeatureCache(path)
    mask = np.zeros(cache.manifest.n_rows, bool)
    mask[[21, 40]] = True
    assert equal(cache.features(CAMERA, mask), cache.features(CAMERA, np.array([21, 40])))
    assert equal(cache.array("actions", mask), cache.array("actions", [21, 40]))
    live = np.zeros(len(cache.live_rows), bool)
    with pytest.raises(CacheError, match=r"all 72 rows .* has shape \(52,\); .* live_rows\[mask\]"):
        cache.features(CAMERA, live)
    with pytest.raises(CacheError, match="a slice, not float64"):
        cache.features(CAMERA, np.array([1.0]))
    assert cache.features(CAMERA, np.array([])).shape == (0, 6)
