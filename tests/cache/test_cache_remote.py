"""A cache on an object store holds what a folder would, and no two writers can mix theirs."""

import concurrent.futures
import multiprocessing
import sys

import numpy as np
import pytest
import zarr
from cache_fakes import CAMERA, OTHER_WEIGHTS, TINY, change_pixel, equal, extract, outputs
from fakes import make_dataset
from object_store import BUCKET, KEYS, s3_server

from cache_pipeline.cache.compact import compact
from cache_pipeline.cache.integrity import check_integrity
from cache_pipeline.cache.manifest_store import MANIFEST, check_claim, claim_manifest
from cache_pipeline.cache.object_store import ObjectStore
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.cache.store import store_at
from cache_pipeline.errors import (
    CachePipelineError,
    ChangedError,
    ConfigError,
    IncompleteCacheError,
    MissingExtraError,
    StaleCacheError,
    StoreError,
)
from cache_pipeline.extract import pipeline, worker
from cache_pipeline.extract.verify import verify


@pytest.fixture(scope="module")
def server():
    with s3_server() as (endpoint, faults):
        yield endpoint, faults


@pytest.fixture
def url(server, monkeypatch, request):
    endpoint, faults = server
    faults.refused = faults.slow = faults.dropped = 0.0
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{request.node.name.replace('[', '_').replace(']', '')}/lift.zarr"


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "demos.hdf5", lengths=(6, 21, 9))


def test_a_cache_on_an_object_store_holds_what_a_folder_holds(url, dataset, tmp_path):
    here, there = tmp_path / "lift.zarr", url
    local, remote = extract(here, dataset, views=2), extract(there, dataset, views=2)
    assert remote.fingerprint == local.fingerprint
    assert outputs(there) == outputs(here)
    one, other = FeatureCache(here), FeatureCache(there)
    for rows in (None, slice(3, 30), np.array([35, 0, 17, 17])):
        assert equal(one.features(CAMERA, rows, view=1), other.features(CAMERA, rows, view=1))
    assert equal(one.views(CAMERA), other.views(CAMERA))
    assert extract(there, dataset, views=2).units_encoded == 0
    assert verify(there, rows=8, encoder=TINY.factory).ok
    assert check_integrity(there).ok


def test_zarr_opens_the_same_url(url, dataset):
    from obstore.store import from_url

    extract(url, dataset)
    plain = from_url(url, client_options={"allow_http": True})
    group = zarr.open_group(zarr.storage.ObjectStore(plain, read_only=True), mode="r")
    assert equal(np.asarray(group[f"features/{CAMERA}"][0, :6]), FeatureCache(url).features(CAMERA, slice(0, 6)))
    assert group.attrs["demo_names"] == ["demo_0", "demo_1", "demo_2"]


def stopped_after(monkeypatch, count):
    """Makes the next extraction stop after ``count`` records."""
    real, left = worker.write_record, iter(range(count))

    def write(*args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(worker, "write_record", write)


def test_an_extraction_that_was_stopped_goes_on_where_it_was(url, dataset, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stopped_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            extract(url, dataset)
    with pytest.raises(IncompleteCacheError, match=f"{url} is unfinished: 5 of"):
        FeatureCache(url)
    assert extract(url, dataset).units_reused == 5
    extract(tmp_path / "lift.zarr", dataset)
    assert outputs(url) == outputs(tmp_path / "lift.zarr")


def test_demos_are_added_changed_and_their_rows_freed(url, tmp_path):
    dataset = make_dataset(tmp_path / "demos.hdf5", lengths=(6, 21))
    extract(url, dataset)
    opened = FeatureCache(url)
    before = opened.features(CAMERA)
    make_dataset(dataset, lengths=(6, 21, 9))
    assert extract(url, dataset).images == 9 * len(opened.cameras)
    assert equal(opened.features(CAMERA), before)
    make_dataset(dataset, lengths=(6, 21, 9), names=("demo_0", "demo_2", "demo_1"))
    change_pixel(dataset, "demo_0", CAMERA, 2)
    extract(url, dataset)
    fingerprint = FeatureCache(url).fingerprint
    result = compact(url)
    assert result.rows_freed > 0
    assert result.bytes_after < result.bytes_before
    assert FeatureCache(url).fingerprint == fingerprint
    assert check_integrity(url).ok
    assert store_at(url).siblings(".") == []
    with pytest.raises(StaleCacheError):
        opened.features(CAMERA)


@pytest.mark.parametrize("command", ["overwrite", "compact"])
@pytest.mark.parametrize("copies", [0, 1, 12])
def test_a_replacement_that_was_stopped_is_finished_by_the_next_run(url, tmp_path, monkeypatch, command, copies):
    dataset = make_dataset(tmp_path / "demos.hdf5", lengths=(6, 21, 9))
    extract(url, dataset)
    options = {"encoders": OTHER_WEIGHTS, "overwrite": True} if command == "overwrite" else {}
    if command == "compact":
        change_pixel(dataset, "demo_0", CAMERA, 2)
        extract(url, dataset)
    run = (lambda: extract(url, dataset, **options)) if command == "overwrite" else (lambda: compact(url))
    real, left = ObjectStore.copy_from, iter(range(copies))

    def copy(store, other, name):
        if next(left, None) is None:
            raise KeyboardInterrupt
        real(store, other, name)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "copy_from", copy)
        with pytest.raises(KeyboardInterrupt):
            run()
    with pytest.raises(IncompleteCacheError, match="is being replaced"):
        FeatureCache(url)
    extract(url, dataset, **{**options, "overwrite": False})
    extract(tmp_path / "lift.zarr", dataset, **options)
    assert FeatureCache(url).fingerprint == FeatureCache(tmp_path / "lift.zarr").fingerprint
    assert check_integrity(url).ok
    assert store_at(url).siblings(".") == []


def when_sealing(monkeypatch, interrupt):
    """Calls ``interrupt`` once, when the next extraction is about to complete its cache."""
    real = pipeline.complete_cache

    def late(*args):
        monkeypatch.setattr(pipeline, "complete_cache", real)
        interrupt()
        real(*args)

    monkeypatch.setattr(pipeline, "complete_cache", late)


def test_of_two_writers_with_other_demos_the_later_one_finishes(url, tmp_path, monkeypatch):
    """The first is stopped before its manifest; meanwhile a second takes over; then the first goes on."""
    one = make_dataset(tmp_path / "one.hdf5", lengths=(6, 21))
    other = make_dataset(tmp_path / "other.hdf5", lengths=(9, 16), seed=1)
    when_sealing(monkeypatch, lambda: extract(url, other))
    with pytest.raises(ChangedError, match=f"another process writes {url} too"):
        extract(url, one)
    extract(tmp_path / "lift.zarr", other)
    assert FeatureCache(url).fingerprint == FeatureCache(tmp_path / "lift.zarr").fingerprint
    assert check_integrity(url).ok


def test_of_two_writers_with_the_same_demos_both_finish(url, dataset, monkeypatch):
    when_sealing(monkeypatch, lambda: extract(url, dataset))
    extract(url, dataset)
    assert check_integrity(url).ok


def test_a_writer_does_not_take_a_claim_made_just_after_for_its_own(url, monkeypatch):
    store, real = store_at(url), ObjectStore._ask

    def followed(self, name, request):
        found = real(self, name, request)
        monkeypatch.setattr(ObjectStore, "_ask", real)
        claim_manifest(store, store.stamp(MANIFEST), {"target": "other"})
        return found

    monkeypatch.setattr(ObjectStore, "_ask", followed)
    claim = claim_manifest(store, None, {"target": "one"})
    with pytest.raises(ChangedError, match=f"another process writes {url} too"):
        check_claim(store, claim)


def test_a_late_write_of_a_writer_that_was_overtaken_does_no_harm(url, tmp_path, monkeypatch):
    """A writer stops just before it writes a shard; another takes over and writes it; then the first goes on."""
    one = make_dataset(tmp_path / "one.hdf5", lengths=(6, 21))
    other = make_dataset(tmp_path / "other.hdf5", lengths=(6, 21), seed=1)
    real, done = ObjectStore.write_after, []

    def late(store, name, stamp, *parts):
        if name.startswith("features/") and not done:
            done.append(name)
            extract(url, other)
        real(store, name, stamp, *parts)

    monkeypatch.setattr(ObjectStore, "write_after", late)
    with pytest.raises(CachePipelineError):
        extract(url, one)
    assert done
    extract(tmp_path / "lift.zarr", other)
    extract(url, other)
    assert FeatureCache(url).fingerprint == FeatureCache(tmp_path / "lift.zarr").fingerprint
    assert check_integrity(url).ok


def test_requests_that_fail_are_repeated(url, server, dataset, tmp_path):
    _, faults = server
    faults.refused, faults.slow, faults.dropped = 0.05, 0.02, 0.03
    extract(url, dataset)
    compact(url)
    found = FeatureCache(url).features(CAMERA)
    faults.refused = faults.slow = faults.dropped = 0.0
    extract(tmp_path / "lift.zarr", dataset)
    assert equal(found, FeatureCache(tmp_path / "lift.zarr").features(CAMERA))
    assert check_integrity(url).ok


def test_a_row_takes_few_requests(url, server, dataset):
    extract(url, dataset)
    cache = FeatureCache(url)
    cache.features(CAMERA, np.array([0]))
    _, faults = server
    faults.requests.clear()
    cache.features(CAMERA, np.array([3]))
    assert len(faults.requests) == 2, faults.requests  # the chunk, and the manifest's stamp


@pytest.mark.parametrize("name", ["manifest.json", "pending.json", "ledger/x.json", "notes.txt"])
def test_other_objects_are_left_alone(url, dataset, name):
    store = store_at(url)
    store.write(name, b"{}")
    for overwrite in (False, True):
        with pytest.raises(CachePipelineError, match="other contents"):
            extract(url, dataset, overwrite=overwrite)
    assert store.read(name) == b"{}"


def test_no_cache_is_made_inside_another(url, dataset):
    extract(url, dataset)
    with pytest.raises(CachePipelineError, match="inside the cache"):
        extract(f"{url}/features/deeper.zarr", dataset)


def test_damage_is_found_and_mended(url, dataset):
    extract(url, dataset)
    store = store_at(url)
    name = next(name for name, _ in store.sizes("features/") if "/c/" in name)
    store.write(name, store.read(name)[:-20])
    assert len(check_integrity(url).broken) == 1
    assert extract(url, dataset).units_encoded == 1
    assert check_integrity(url).ok


def test_a_place_that_cannot_be_reached_is_one_line(url, server, dataset, monkeypatch):
    with pytest.raises(StoreError, match=r"the bucket s3://nowhere does not exist"):
        extract("s3://nowhere/lift.zarr", dataset)
    with pytest.raises(StoreError, match=r"the bucket s3://nowhere does not exist"):
        FeatureCache("s3://nowhere/lift.zarr")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match=r"s3://bucket/lift.zarr cannot be reached \(.*; check the endpoint"):
        FeatureCache("s3://bucket/lift.zarr")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("ftp://host/lift.zarr", "ftp:// is not a kind of store; available: s3"),
        ("s3://bucket", "names no bucket"),
        ("s3:///lift.zarr", "names no bucket"),
    ],
)
def test_a_wrong_url_is_one_line(wrong, said):
    with pytest.raises(ConfigError, match=said):
        FeatureCache(wrong)


def test_a_url_without_the_extra_names_it(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "obstore"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(MissingExtraError, match="uv sync --extra remote"):
        FeatureCache("s3://bucket/lift.zarr")


def in_another_process(how, cache):
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context(how)) as pool:
        return pool.submit(cache.features, CAMERA).result()


def test_it_is_read_in_spawned_processes(url, dataset):
    extract(url, dataset)
    cache = FeatureCache(url)
    assert equal(in_another_process("spawn", cache), cache.features(CAMERA))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_is_told_to_be_spawned(url, dataset):
    extract(url, dataset)
    cache = FeatureCache(url)
    with pytest.raises(StoreError, match="multiprocessing_context='spawn'"):
        in_another_process("fork", cache)


def test_parts_one_after_another_and_at_once_give_the_cache_of_one_process(url, dataset, tmp_path):
    extract(tmp_path / "lift.zarr", dataset)
    for number in (2, 1, 3):
        extract(url, dataset, part=f"{number}/3")
    assert outputs(url) == outputs(tmp_path / "lift.zarr")
    beside = f"{url}2"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        parts = [pool.submit(extract, beside, dataset, part=f"{number}/2") for number in (1, 2)]
    for part in parts:
        assert part.exception() is None or isinstance(part.exception(), ChangedError)
    for number in (1, 2):
        extract(beside, dataset, part=f"{number}/2")
    assert outputs(beside) == outputs(tmp_path / "lift.zarr")


def test_workers_write_to_it(url, dataset, tmp_path):
    extract(tmp_path / "lift.zarr", dataset)
    extract(url, dataset, workers=2)
    assert outputs(url) == outputs(tmp_path / "lift.zarr")
