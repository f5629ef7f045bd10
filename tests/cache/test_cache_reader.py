import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from cache_fakes import CAMERA, OTHER, equal, extract
from fakes import make_dataset
from hypothesis import given
from hypothesis import strategies as st

from cache_pipeline.cache import arrays
from cache_pipeline.cache.manifest_store import MANIFEST
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.errors import CacheError, CorruptCacheError, IncompleteCacheError, NotACacheError

N = 54


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Three demos in blocks of 16, the second removed and a fourth appended: dead rows lie between live ones."""
    folder = tmp_path_factory.mktemp("reader")
    names = ["demo_0", "demo_1", "demo_2"]
    dataset = make_dataset(folder / "demos.hdf5", lengths=(20, 5, 30), names=names)
    extract(folder / "cache.zarr", dataset, views=2)
    make_dataset(dataset, lengths=(20, 30, 4), names=["demo_0", "demo_2", "demo_3"])
    extract(folder / "cache.zarr", dataset, views=2)
    return folder / "cache.zarr"


def test_all_live_rows_come_demo_after_demo_without_dead_ones(path):
    cache = FeatureCache(path)
    assert [demo.name for demo in cache.demos] == ["demo_0", "demo_2", "demo_3"]
    assert cache.starts.tolist() == [0, 25, 64]
    assert cache.packed_starts.tolist() == [0, 20, 50]
    packed = cache.features(CAMERA)
    assert packed.shape == (N, 6)
    for demo, start in zip(cache.demos, cache.packed_starts, strict=True):
        rows = cache.features(CAMERA, slice(demo.row, demo.row + demo.length))
        assert equal(packed[start : start + demo.length], rows)
    assert not np.isnan(packed).any()
    assert equal(packed, cache.features(CAMERA, cache.live_rows))


def test_all_views_come_in_one_array(path):
    cache = FeatureCache(path)
    both = cache.views(CAMERA)
    assert both.shape == (2, N, 6)
    for view in (0, 1):
        assert equal(both[view], cache.features(CAMERA, view=view))
    assert equal(cache.views(CAMERA, 1), both[:1])
    with pytest.raises(CacheError, match=r"views 0 to 1 .*--views 3"):
        cache.views(CAMERA, 3)


def test_reading_in_threads_and_in_small_pieces_gives_the_same(path, monkeypatch):
    whole = FeatureCache(path).views(OTHER)
    monkeypatch.setattr(arrays, "THREADED_BYTES", 0)
    for size in (1, 60, 100):
        monkeypatch.setattr(arrays, "PIECE_BYTES", size)
        cache = FeatureCache(path)
        assert equal(cache.views(OTHER), whole)
        assert equal(cache.features(OTHER, cache.live_rows, 1), whole[1])


@given(st.lists(st.integers(0, 67), max_size=20))
def test_rows_come_in_the_order_asked_for(path, rows):
    cache = FeatureCache(path)
    everything = cache.array("actions", slice(None))
    assert everything.shape[0] == 68
    assert equal(cache.array("actions", np.array(rows, np.int64)), everything[rows])


def test_index_arrays_of_any_shape_are_taken(path):
    cache = FeatureCache(path)
    rows = np.array([[1, 0], [66, 1]])
    assert equal(cache.features(OTHER, rows, 1)[1, 1], cache.features(OTHER, np.array([1]), 1)[0])


def test_slices_step_and_turn_as_in_numpy(path):
    cache = FeatureCache(path)
    everything = cache.array("rewards", slice(None))
    for rows in (slice(2, 9, 3), slice(9, 2, -2), slice(-4, None), slice(5, 5)):
        assert equal(cache.array("rewards", rows), everything[rows])


def test_rows_outside_are_refused(path):
    with pytest.raises(IndexError, match=r"rows must lie in \[0, 68\)"):
        FeatureCache(path).features(CAMERA, np.array([68]))


def test_unknown_names_list_the_known_ones(path):
    cache = FeatureCache(path)
    with pytest.raises(CacheError, match=r"no camera 'agentview'.*did you mean agentview_image"):
        cache.features("agentview")
    with pytest.raises(CacheError, match=r"views 0 to 1 .*--views 3"):
        cache.features(CAMERA, view=2)
    with pytest.raises(CacheError, match=r"no array 'action'.*did you mean actions"):
        cache.array("action")


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_cache_in_use_works_in_forked_and_spawned_workers(path, method):
    cache = FeatureCache(path)
    mine = cache.features(CAMERA, np.array([3, 64]))
    with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
        assert equal(pool.submit(cache.features, CAMERA, np.array([3, 64])).result(60), mine)


def test_pickling_carries_no_open_arrays(path):
    cache = FeatureCache(path)
    cache.features(CAMERA)
    again = pickle.loads(pickle.dumps(cache))
    assert again._open == {}
    assert equal(again.features(CAMERA), cache.features(CAMERA))


def test_the_encoder_is_in_the_cache(path):
    assert FeatureCache(path).encoder_file(CAMERA).is_file()


def test_bytes_in_memory_are_told(path):
    cache = FeatureCache(path)
    assert cache.nbytes() == 2 * 2 * N * 6 * 2
    assert cache.nbytes(views=1) == 2 * N * 6 * 2


def test_what_is_no_cache_is_told_apart(path, tmp_path):
    with pytest.raises(NotACacheError, match="does not exist"):
        FeatureCache(tmp_path / "nothing.zarr")
    with pytest.raises(NotACacheError, match="is a file"):
        FeatureCache(path / MANIFEST)
    with pytest.raises(NotACacheError, match="no manifest"):
        FeatureCache(tmp_path)


def test_an_unfinished_cache_says_how_far_it_is(tmp_path):
    dataset = make_dataset(tmp_path / "d.hdf5", lengths=(7,))
    extract(tmp_path / "c.zarr", dataset)
    (tmp_path / "c.zarr" / MANIFEST).rename(tmp_path / "c.zarr" / "pending.json")
    with pytest.raises(IncompleteCacheError, match="7 of 7 units are done"):
        FeatureCache(tmp_path / "c.zarr")


def test_metadata_that_does_not_fit_the_manifest_is_refused(tmp_path):
    dataset = make_dataset(tmp_path / "d.hdf5", lengths=(7,))
    extract(tmp_path / "c.zarr", dataset)
    file = tmp_path / "c.zarr/features" / CAMERA / "zarr.json"
    file.write_text(file.read_text().replace("float16", "float32"))
    with pytest.raises(CorruptCacheError, match="another shape or type"):
        FeatureCache(tmp_path / "c.zarr")
