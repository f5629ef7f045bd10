import json
import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from cache_fakes import CAMERA, OTHER, OTHER_WEIGHTS, OVERFLOWING, TINY, change_pixel, config, equal, extract, outputs
from fakes import make_dataset

from cache_pipeline.cache import folder
from cache_pipeline.cache.folder import MARKER, stores_beside
from cache_pipeline.cache.manifest_store import MANIFEST, PENDING, read_manifest
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.cache.store import store_at
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.encoders.frozen import FrozenEncoder
from cache_pipeline.encoders.image_encoder import EncoderSpec, build_encoder
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.encoders.view_spec import ViewSpec
from cache_pipeline.encoders.views import view_parameters
from cache_pipeline.errors import DatasetError, EncoderError, NotACacheError
from cache_pipeline.extract.encode import BatchEncoder
from cache_pipeline.extract.pipeline import extract_features
from cache_pipeline.extract.plan import plan_extraction

LENGTHS = (7, 5, 9, 30)


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "demos.hdf5", lengths=LENGTHS)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "cache.zarr"


def test_the_cache_holds_the_encoders_feature_of_every_frame(dataset, out):
    extract(out, dataset, store_dtype="float32")
    cache, source = FeatureCache(out), Dataset.open(dataset)
    encoder = FrozenEncoder(build_encoder(TINY), Preprocess(), "cpu", "fp32")
    for number, demo in enumerate(cache.demos):
        for camera in (CAMERA, OTHER):
            live = BatchEncoder(4, "float32")(encoder, source.frames(number, camera))
            assert np.abs(cache.features(camera, slice(demo.row, demo.row + demo.length)) - live).max() < 1e-5


def test_the_cache_holds_actions_and_low_dim_obs_so_that_no_dataset_is_needed(dataset, out):
    extract(out, dataset)
    cache, source = FeatureCache(out), Dataset.open(dataset)
    for number, demo in enumerate(cache.demos):
        for name, values in source.rows(number).items():
            assert equal(cache.array(name, slice(demo.row, demo.row + demo.length)), values)
    assert cache.masks == source.masks
    assert cache.env_args == source.env_args


def test_maps_are_cached_at_an_earlier_cut(dataset, out):
    extract(out, dataset, encoders=EncoderSpec(weights="random", cut="layer1"), cameras=(CAMERA,))
    cache = FeatureCache(out)
    assert cache.features(CAMERA).shape == (sum(LENGTHS), *cache.cameras[CAMERA].feature_shape)
    assert len(cache.cameras[CAMERA].feature_shape) == 3


def test_a_view_shows_every_frame_of_a_demo_alike_and_differs_from_the_clean_one(dataset, out):
    extract(out, dataset, views=2, preprocess=Preprocess(crop_shape=(20, 20)), store_dtype="float32")
    cache, source = FeatureCache(out), Dataset.open(dataset)
    encoder = FrozenEncoder(build_encoder(TINY), Preprocess(crop_shape=(20, 20)), "cpu", "fp32")
    demo = cache.demos[2]
    view = view_parameters(ViewSpec(), demo.view_key, CAMERA, 1)
    live = encoder(source.frames(2, CAMERA), view).numpy()
    stored = cache.features(CAMERA, slice(demo.row, demo.row + demo.length), view=1)
    assert np.abs(stored - live).max() < 1e-5
    assert np.abs(stored - cache.features(CAMERA, slice(demo.row, demo.row + demo.length))).max() > 1e-3


def test_a_second_run_does_nothing_and_says_so(dataset, out):
    first = extract(out, dataset)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    second = extract(out, dataset)
    assert (second.units_encoded, second.units_reused) == (0, first.units_encoded)
    assert second.fingerprint == first.fingerprint
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before


def test_the_result_has_the_fields_that_scripts_rely_on(dataset, out):
    value = extract(out, dataset).to_json()
    assert list(value) == [
        *("cache", "images", "cameras", "seconds", "images_per_s", "read_s", "encode_s", "write_s"),
        *("bytes", "units_encoded", "units_reused", "fingerprint", "units_missing", "part"),
    ]
    assert value["images"] == 2 * sum(LENGTHS)
    json.dumps(value)


def test_a_changed_demo_alone_is_encoded_again(dataset, out):
    extract(out, dataset)
    before = FeatureCache(out)
    change_pixel(dataset, "demo_2", CAMERA, 3)
    result = extract(out, dataset)
    after = FeatureCache(out)
    assert result.images == 2 * LENGTHS[2]
    assert [d.row for d in after.demos[:2]] == [d.row for d in before.demos[:2]]
    assert after.demos[2].row == 64
    assert after.fingerprint != before.fingerprint


def test_of_a_hundred_demos_one_changed_is_encoded_alone(tmp_path, out):
    lengths = tuple(2 + number % 5 for number in range(100))
    dataset = make_dataset(tmp_path / "hundred.hdf5", lengths=lengths)
    whole = extract(out, dataset, cameras=(CAMERA,), shard_rows=8)
    before = FeatureCache(out).manifest.units
    change_pixel(dataset, "demo_57", CAMERA, 1)
    result = extract(out, dataset, cameras=(CAMERA,), shard_rows=8)
    assert result.images == lengths[57]
    assert result.units_encoded == 5  # features, frame digests, steps and two low-dim keys
    assert result.units_reused >= whole.units_encoded - 5 * 2
    kept = FeatureCache(out).manifest.units
    assert {name: kept[name] for name in kept if name in before}.items() <= before.items()


def test_an_extended_cache_holds_the_same_bits_as_one_made_at_once(tmp_path):
    whole = make_dataset(tmp_path / "whole.hdf5", lengths=LENGTHS, masks={})
    part = make_dataset(tmp_path / "part.hdf5", lengths=LENGTHS[:2], masks={})
    extract(tmp_path / "at_once.zarr", whole, views=2)
    extract(tmp_path / "extended.zarr", part)
    shutil.copy(whole, part)
    extract(tmp_path / "extended.zarr", part)
    extract(tmp_path / "extended.zarr", part, views=2)
    at_once, extended = FeatureCache(tmp_path / "at_once.zarr"), FeatureCache(tmp_path / "extended.zarr")
    for camera in (CAMERA, OTHER):
        for view in (0, 1):
            assert equal(at_once.features(camera, view=view), extended.features(camera, view=view))
    assert at_once.fingerprint == extended.fingerprint


def test_added_demos_are_appended_and_removed_ones_leave_the_table(tmp_path, out):
    dataset = make_dataset(tmp_path / "d.hdf5", lengths=(7, 5))
    extract(out, dataset)
    make_dataset(dataset, lengths=(5, 4), names=["demo_1", "demo_7"])
    result = extract(out, dataset)
    cache = FeatureCache(out)
    assert [demo.name for demo in cache.demos] == ["demo_1", "demo_7"]
    assert result.images == 2 * 4
    assert cache.features(CAMERA).shape[0] == 9


def test_more_views_leave_the_finished_units_alone(dataset, out):
    first = extract(out, dataset)
    second = extract(out, dataset, views=3)
    assert second.units_reused == first.units_encoded
    assert second.images == 2 * 2 * sum(LENGTHS)
    assert extract(out, dataset).units_encoded == 0
    assert FeatureCache(out).cameras[CAMERA].views == 3


def test_a_camera_is_added_without_touching_the_other(dataset, out):
    extract(out, dataset, cameras=(CAMERA,))
    result = extract(out, dataset, cameras=(OTHER,))
    assert result.images == sum(LENGTHS)
    assert set(FeatureCache(out).cameras) == {CAMERA, OTHER}


def test_moving_and_touching_a_file_changes_nothing(dataset, out, tmp_path):
    first = extract(out, dataset)
    os.utime(dataset, ns=(1, 1))
    assert extract(out, dataset).images == 0
    moved = tmp_path / "elsewhere.hdf5"
    dataset.rename(moved)
    second = extract(out, moved)
    assert (second.images, second.fingerprint) == (0, first.fingerprint)


def test_several_files_make_one_cache(tmp_path, out):
    one = make_dataset(tmp_path / "one.hdf5", lengths=(7, 5))
    two = make_dataset(tmp_path / "two.hdf5", lengths=(6,), seed=1)
    extract(out, one)
    assert extract(out, one, two).images == 2 * 6
    cache = FeatureCache(out)
    assert [(d.file, d.name) for d in cache.demos] == [(0, "demo_0"), (0, "demo_1"), (1, "demo_0")]


def test_a_pixel_changed_behind_the_file_systems_back_is_found_by_deep(dataset, out):
    extract(out, dataset)
    stat = dataset.stat()
    change_pixel(dataset, "demo_1", OTHER, 0)
    os.utime(dataset, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    if dataset.stat().st_size == stat.st_size:
        assert extract(out, dataset).images == 0
        assert extract(out, dataset, deep=True).images == 2 * LENGTHS[1]


def test_overwrite_keeps_the_old_cache_until_the_new_one_is_complete(dataset, out, monkeypatch):
    extract(out, dataset)
    before = outputs(out)
    other = config(out, dataset, overwrite=True, preprocess=Preprocess(imagenet_norm=False))

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cache_pipeline.extract.pipeline.finish", stop)
        with pytest.raises(KeyboardInterrupt):
            extract_features(other, progress=False)
    assert outputs(out) == before
    (new,) = [store.place for store in stores_beside(store_at(out), "new")]
    assert (new / PENDING).is_file()
    assert new.name.startswith(".cache.zarr.")
    result = extract_features(other, progress=False)
    assert result.images == 0
    assert FeatureCache(out).fingerprint != before["fingerprint"]
    assert {file.name for file in out.parent.iterdir()} == {"demos.hdf5", "cache.zarr"}


@pytest.mark.parametrize("cut_before", ["first rename", "second rename", "removing the old one"])
def test_a_swap_that_was_cut_off_is_finished_by_the_next_run(dataset, out, cut_before, monkeypatch):
    extract(out, dataset)
    renames = iter([None, None, None] if cut_before == "removing the old one" else [None] * (cut_before[0] == "s"))
    real = os.rename

    def rename(*args):
        if next(renames, "stop") == "stop":
            raise KeyboardInterrupt
        real(*args)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder.os, "rename", rename)
        patch.setattr(folder, "_clear_away", stop)
        with pytest.raises(KeyboardInterrupt):
            extract(out, dataset, encoders=OTHER_WEIGHTS, overwrite=True)
    assert out.exists() is (cut_before != "second rename")
    assert extract(out, dataset, encoders=OTHER_WEIGHTS).images == 0
    assert {file.name for file in out.parent.iterdir()} == {"demos.hdf5", "cache.zarr"}
    assert not (out / MARKER).exists()


def test_a_folder_that_is_no_cache_is_never_touched(dataset, out):
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(NotACacheError, match="other contents"):
            extract(out, dataset, overwrite=overwrite)
    assert [file.name for file in out.iterdir()] == ["thesis.tex"]


def test_a_feature_that_does_not_fit_the_stored_dtype_is_refused_by_frame(dataset, out):
    with pytest.raises(EncoderError, match=r"demo_0: the feature of agentview_image frame \d+ .*--store-dtype float32"):
        extract(out, dataset, encoders=OVERFLOWING, cameras=(CAMERA,))
    assert not (out / MANIFEST).exists()


def test_an_error_of_the_reading_thread_comes_out_as_itself(dataset, out, monkeypatch):
    gather = Dataset.gather

    def fail(self, *args):
        if threading.current_thread().name == "read":
            raise DatasetError("the disk is on fire")
        return gather(self, *args)

    monkeypatch.setattr(Dataset, "gather", fail)
    with pytest.raises(DatasetError, match="on fire"):
        extract(out, dataset)


def test_batches_halve_when_memory_does_not_suffice(dataset, out, monkeypatch, caplog):
    real = FrozenEncoder.__call__

    def limited(self, frames, view=None):
        if len(frames) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, frames, view)

    monkeypatch.setattr(FrozenEncoder, "__call__", limited)
    extract(out, dataset, batch_size=8)
    assert read_manifest(out).batch_size == 2
    assert "out of memory: batches of 2 frames from now on" in caplog.text


def test_a_file_that_changes_while_it_is_read_leaves_no_complete_cache(dataset, out, monkeypatch):
    real = BatchEncoder.__call__

    def touch(self, *args):
        os.utime(dataset, ns=(time.time_ns(), time.time_ns()))
        return real(self, *args)

    monkeypatch.setattr(BatchEncoder, "__call__", touch)
    with pytest.raises(DatasetError, match="has changed since it was opened"):
        extract(out, dataset)
    assert not (out / MANIFEST).exists()


def test_the_dry_run_predicts_the_run_and_writes_nothing(dataset, out):
    plan = plan_extraction(config(out, dataset, views=2))
    assert not out.exists()
    result = extract(out, dataset, views=2)
    assert (plan.images, plan.units) == (result.images, result.units_encoded)
    assert plan.seconds > 0
    json.dumps(plan.to_json())
    change_pixel(dataset, "demo_1", CAMERA, 0)
    plan = plan_extraction(config(out, dataset))
    assert plan.changed == ("demo_1",)
    assert plan.images == 2 * 2 * LENGTHS[1]
