"""Comparison of a cache with its source files before training: by size and time, then by content."""

import json
import os
import shutil

import h5py
import pytest
from cache_fakes import CAMERA, change_pixel, extract
from fakes import make_dataset

from cache_pipeline.cache.manifest_store import read_manifest
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.errors import DatasetError, StaleCacheError
from cache_pipeline.extract.freshness import check_sources
from cache_pipeline.files import json_digest


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "demos.hdf5")


@pytest.fixture
def out(tmp_path, dataset):
    extract(tmp_path / "cache.zarr", dataset)
    return tmp_path / "cache.zarr"


def check(out, *datasets, **options):
    check_sources(FeatureCache(out), datasets, **options)


def stale(out, *datasets, **options):
    with pytest.raises(StaleCacheError) as caught:
        check(out, *datasets, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def kept_time(path, change):
    """Changes a file behind its size and time."""
    before = path.stat()
    change()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_changed_recorded_files_are_an_error_without_naming_datasets(out, dataset):
    check(out)
    change_pixel(dataset, "demo_0", CAMERA, 0)
    assert f"demo demo_0 camera {CAMERA} frame 0" in stale(out)
    assert f"demo demo_0 camera {CAMERA} frame 0" in stale(out, dataset)


def test_added_demos_are_named(out, dataset):
    make_dataset(dataset, lengths=(7, 5, 9, 4, 6), masks={"train": ["demo_0", "demo_1"], "valid": ["demo_2"]})
    assert "demo demo_3 is 'absent' in the cache" in stale(out)
    assert "demos.hdf5 has 2 demos more than the cache (demo_3, demo_4)" in stale(out)


def test_a_file_that_was_only_touched_is_read_again_and_accepted(out, dataset, caplog):
    os.utime(dataset)
    with caplog.at_level("INFO", "cache_pipeline"):
        check(out)
    assert "has the same content as its 1 source files" in caplog.text


def test_a_file_that_is_not_there_is_noted_once(out, dataset, caplog):
    dataset.rename(dataset.with_name("moved.hdf5"))
    with caplog.at_level("INFO", "cache_pipeline"):
        check(out)
    assert len(caplog.records) == 1
    assert "demos.hdf5 is missing, so they are not compared" in caplog.text
    check(out, dataset.with_name("moved.hdf5"))


def test_a_file_that_is_named_and_not_there_is_an_error(out, dataset):
    with pytest.raises(DatasetError, match=r"there is no file .*nowhere\.hdf5"):
        check(out, dataset.with_name("nowhere.hdf5"))


def test_another_dataset_is_refused_by_name(out, tmp_path):
    other = make_dataset(tmp_path / "other.hdf5", seed=5)
    message = stale(out, other)
    assert "dataset is 'demos.hdf5' in the cache" in message
    assert "other.hdf5" in message
    assert "none of its 3 demos is in" in message


def test_deep_finds_changes_that_keep_size_and_time(out, dataset):
    kept_time(dataset, lambda: change_pixel(dataset, "demo_2", CAMERA, 4))
    check(out)
    check(out, dataset)
    assert f"demo demo_2 camera {CAMERA} frame 4" in stale(out, deep=True)


def test_files_may_come_in_any_order_from_anywhere_but_all_of_them(tmp_path):
    first, second = make_dataset(tmp_path / "a.hdf5"), make_dataset(tmp_path / "b.hdf5", seed=1)
    extract(tmp_path / "c.zarr", first, second)
    copies = [shutil.copyfile(path, tmp_path / f"copy_{path.name}") for path in (second, first)]
    check(tmp_path / "c.zarr", *copies)
    message = stale(tmp_path / "c.zarr", second)
    assert "a.hdf5; name all files of the cache" in message


def test_a_cache_of_a_filter_key_is_compared_with_that_keys_demos(tmp_path, dataset):
    extract(tmp_path / "c.zarr", dataset, filter_key="train")
    os.utime(dataset)
    check(tmp_path / "c.zarr")
    check(tmp_path / "c.zarr", dataset)


def link_frames(path, elsewhere):
    key = f"data/demo_1/obs/{CAMERA}"
    with h5py.File(path, "r+") as file, h5py.File(elsewhere, "w") as other:
        other["images"] = file[key][()]
        del file[key]
        file[key] = h5py.ExternalLink(elsewhere.name, "images")


def test_a_file_behind_a_link_counts_as_a_source(tmp_path, dataset):
    elsewhere = tmp_path / "frames.hdf5"
    link_frames(dataset, elsewhere)
    extract(tmp_path / "c.zarr", dataset)
    (record,) = read_manifest(tmp_path / "c.zarr").files
    assert [item[0] for item in record.linked] == [str(elsewhere)]
    assert extract(tmp_path / "c.zarr", dataset).images == 0
    check(tmp_path / "c.zarr")
    with h5py.File(elsewhere, "r+") as file:
        file["images"][2] ^= 1
    assert f"demo demo_1 camera {CAMERA} frame 2" in stale(tmp_path / "c.zarr")
    assert extract(tmp_path / "c.zarr", dataset).images == 2 * 5  # both cameras of the changed demo
    check(tmp_path / "c.zarr")


def test_a_manifest_of_before_links_and_filter_keys_were_recorded_is_read(out, dataset):
    value = json.loads((out / "manifest.json").read_text())
    for key in ("absent", "filter_key", "digest"):
        del value[key]
    (out / "manifest.json").write_text(json.dumps({**value, "digest": json_digest(value)}))
    assert read_manifest(out).files[0].linked == ()
    check(out)
    make_dataset(dataset, lengths=(7, 5, 9, 4), masks={})  # a demo more: of what key the cache is, it does not say
    check(out)
    change_pixel(dataset, "demo_0", CAMERA, 0)
    with pytest.raises(StaleCacheError):
        check(out)
