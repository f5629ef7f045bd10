"""Datasets under URLs are copied once, and known by their URL."""

import threading
from pathlib import Path

import pytest
from cache_fakes import CAMERA, TINY, change_pixel, extract, outputs
from fakes import make_dataset
from lerobot_fakes import make_lerobot
from object_store import BUCKET, KEYS, s3_server, upload

from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.demos import remote
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.demos.remote import is_there, local_path, recorded_path, stamp_of, url_of
from cache_pipeline.errors import (
    ChangedError,
    ConfigError,
    DatasetError,
    MissingExtraError,
    StaleCacheError,
    StoreError,
)
from cache_pipeline.extract.freshness import check_sources
from cache_pipeline.extract.verify import verify
from cache_pipeline.reports.inspection import inspect_path


@pytest.fixture(scope="module")
def server():
    with s3_server() as (endpoint, faults):
        yield endpoint, faults


@pytest.fixture
def faults(server, monkeypatch, tmp_path):
    endpoint, faults = server
    faults.refused = faults.slow = faults.dropped = 0.0
    faults.requests.clear()
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": endpoint, remote.HOME: str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, value)
    return faults


@pytest.fixture
def url(faults, request):
    return f"s3://{BUCKET}/{request.node.name.replace('[', '_').replace(']', '')}/demos.hdf5"


def fetched(faults) -> int:
    """Number of requests for bytes."""
    return sum(method == "GET" and "list-type" not in path for method, path in faults.requests)


def test_paths_and_urls():
    assert url_of("lift.hdf5") is url_of(Path("/data/lift.hdf5")) is url_of("file:///data/lift.hdf5") is None
    assert url_of("s3://bucket/a/lift.hdf5") == url_of(Path("s3://bucket/a/lift.hdf5")) == "s3://bucket/a/lift.hdf5"
    assert local_path("file:///data/lift.hdf5") == local_path(Path("file:///data/lift.hdf5")) == Path("/data/lift.hdf5")
    assert recorded_path(Path("s3://bucket/lift.hdf5")) == "s3://bucket/lift.hdf5"


def test_a_cache_of_a_url_is_that_of_the_file(url, tmp_path):
    local = make_dataset(tmp_path / "demos.hdf5", lengths=(6, 9))
    upload(local, url)
    extract(tmp_path / "here.zarr", local)
    extract(tmp_path / "there.zarr", url)
    assert outputs(tmp_path / "here.zarr") == outputs(tmp_path / "there.zarr")
    cache = FeatureCache(tmp_path / "there.zarr")
    assert [source.path for source in cache.manifest.files] == [url]
    check_sources(cache)
    check_sources(cache, [url])
    assert verify(tmp_path / "there.zarr", encoder=TINY.factory).ok
    assert not inspect_path(url).problems


def test_a_copy_is_made_once_and_again_where_it_is_missing(url, tmp_path, faults):
    upload(make_dataset(tmp_path / "demos.hdf5", lengths=(6, 9)), url)
    extract(tmp_path / "lift.zarr", url)
    before = fetched(faults)
    assert extract(tmp_path / "lift.zarr", url).units_encoded == 0
    assert fetched(faults) == before
    local_path(url).unlink()
    assert verify(tmp_path / "lift.zarr", encoder=TINY.factory).ok
    assert fetched(faults) > before
    assert recorded_path(local_path(url)) == url


def test_stamps_of_the_same_second_and_size_differ_by_the_entity_tag(url, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"first")
    second.write_bytes(b"other")
    for _ in range(20):
        stamps = []
        for local in (first, second):
            upload(local, url)
            stamps.append(stamp_of(url))
        if len({stamp.mtime_ns // remote.NANOSECONDS for stamp in stamps}) == 1:
            break
    else:
        raise AssertionError("no two uploads were in one second")
    assert stamps[0].size == stamps[1].size
    assert stamps[0].mtime_ns != stamps[1].mtime_ns


def test_a_replaced_object_of_the_same_size_is_noticed(url, tmp_path):
    local = make_dataset(tmp_path / "demos.hdf5", lengths=(6, 9))
    upload(local, url)
    extract(tmp_path / "lift.zarr", url)
    before = stamp_of(url)
    change_pixel(local, "demo_0", CAMERA, 2)
    upload(local, url)
    assert stamp_of(url).size == before.size
    cache = FeatureCache(tmp_path / "lift.zarr")
    with pytest.raises(StaleCacheError, match="frame"):
        check_sources(cache)
    assert extract(tmp_path / "lift.zarr", url).units_encoded > 0
    check_sources(FeatureCache(tmp_path / "lift.zarr"))


def test_a_copy_goes_on_where_it_stopped(url, tmp_path, faults, monkeypatch):
    local = make_dataset(tmp_path / "demos.hdf5", lengths=(6, 9))
    upload(local, url)
    monkeypatch.setattr(remote, "PIECE", 1000)
    monkeypatch.setattr(remote, "PIECES_AT_ONCE", 2)
    asked, real = [], remote._ranges

    def break_off(start, stop, *rest):
        asked.append(start)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return real(start, stop, *rest)

    monkeypatch.setattr(remote, "_ranges", break_off)
    with pytest.raises(KeyboardInterrupt):
        local_path(url)
    assert local_path(url).read_bytes() == local.read_bytes()
    assert asked[3:5] == [6000, 6000]
    assert not list(local_path(url).parent.glob("*.partial"))


def test_an_object_that_changes_while_it_is_copied_is_not_mixed(url, tmp_path, monkeypatch):
    local = make_dataset(tmp_path / "demos.hdf5", lengths=(6, 9))
    upload(local, url)
    real = remote._download

    def change(*arguments):
        real(*arguments)
        change_pixel(local, "demo_0", CAMERA, 2)
        upload(local, url)

    monkeypatch.setattr(remote, "_download", change)
    with pytest.raises(ChangedError, match="was written while it was copied"):
        local_path(url)
    monkeypatch.setattr(remote, "_download", real)
    assert local_path(url).read_bytes() == local.read_bytes()


def test_a_bad_connection_gives_the_same_bytes(url, tmp_path, faults, monkeypatch):
    local = make_dataset(tmp_path / "demos.hdf5", lengths=(6, 9))
    upload(local, url)
    monkeypatch.setattr(remote, "PIECE", 5000)
    monkeypatch.setattr(remote, "PIECES_AT_ONCE", 2)
    faults.refused, faults.slow, faults.dropped = 0.05, 0.02, 0.03
    assert local_path(url).read_bytes() == local.read_bytes()


def test_two_processes_copy_once(url, tmp_path, faults):
    upload(make_dataset(tmp_path / "demos.hdf5", lengths=(6, 9)), url)
    faults.requests.clear()
    threads = [threading.Thread(target=local_path, args=(url,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched(faults) == 1


def test_a_lerobot_folder(url, tmp_path):
    folder = url.removesuffix(".hdf5")
    local = tmp_path / "demos"
    make_lerobot(local, images="PNG", lengths=(7, 5, 9))
    upload(local, folder)
    extract(tmp_path / "here.zarr", local)
    extract(tmp_path / "there.zarr", folder)
    assert outputs(tmp_path / "here.zarr") == outputs(tmp_path / "there.zarr")
    cache = FeatureCache(tmp_path / "there.zarr")
    assert cache.manifest.files[0].path == folder
    check_sources(cache)
    fewer = tmp_path / "fewer"
    make_lerobot(fewer, images="PNG", lengths=(7,))
    upload(fewer, folder)
    with Dataset.open(folder) as dataset:
        assert [demo.length for demo in dataset.demos] == [7]
    assert {str(file.relative_to(fewer)) for file in fewer.rglob("*.parquet")} == {
        str(file.relative_to(local_path(folder))) for file in local_path(folder).rglob("*.parquet")
    }


def test_a_source_that_cannot_be_reached_does_not_keep_from_training(url, tmp_path, monkeypatch, caplog):
    upload(make_dataset(tmp_path / "demos.hdf5", lengths=(6, 9)), url)
    extract(tmp_path / "lift.zarr", url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    caplog.set_level("INFO")
    check_sources(FeatureCache(tmp_path / "lift.zarr"))
    assert "cannot be reached" in caplog.text
    assert "they are not compared" in caplog.text


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ("s3://bucket/nothing.hdf5", DatasetError, "there is no HDF5 file s3://bucket/nothing.hdf5"),
        ("s3://nowhere/lift.hdf5", StoreError, "the bucket s3://nowhere does not exist"),
        ("http://host/lift.hdf5", ConfigError, "http:// is not a kind of store; available: s3"),
        ("s3://bucket", ConfigError, r"names no bucket and folder; give s3://BUCKET/lift.hdf5"),
        ("s3://bucket/a/../lift.hdf5", ConfigError, "rename the object"),
    ],
)
def test_a_wrong_url_is_one_line(faults, wrong, error, message):
    with pytest.raises(error, match=message) as caught:
        Dataset.open(wrong)
    assert "\n" not in str(caught.value)


def test_there_must_be_space_for_a_copy(url, tmp_path, monkeypatch):
    upload(make_dataset(tmp_path / "demos.hdf5", lengths=(6, 9)), url)
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(ConfigError, match=f"free some space, or name another folder for copies with {remote.HOME}"):
        local_path(url)


def test_the_extra_is_named(url, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    with pytest.raises(MissingExtraError, match="remote"):
        local_path(url)


def test_what_is_there(url, tmp_path):
    assert not is_there(url)
    upload(make_dataset(tmp_path / "demos.hdf5", lengths=(6,)), url)
    assert is_there(url)
    assert is_there(tmp_path)
