"""Batch sizes follow the data; the plan says the memory; metadata of unchanged files is taken from the manifest."""

import os

import h5py
import pytest
from cache_fakes import CAMERA, config, extract, outputs
from fakes import make_dataset

from cache_pipeline.cache.manifest_store import read_manifest
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.encoders.frozen import preferred_batch_size
from cache_pipeline.extract.plan import plan_extraction
from cache_pipeline.extract.verify import verify


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "demos.hdf5", lengths=(30, 50))


def test_a_huge_batch_size_is_the_size_of_a_unit_and_says_so(dataset, tmp_path, caplog):
    extract(tmp_path / "a.zarr", dataset, batch_size=10**9, shard_rows=70)
    assert read_manifest(tmp_path / "a.zarr").batch_size == 70
    assert "batch_size 1000000000 is more than the 70 frames of a unit; 70 is used" in caplog.text


def test_a_usual_batch_size_is_kept_on_little_data(dataset, tmp_path, caplog):
    extract(tmp_path / "a.zarr", dataset, batch_size=None)
    assert read_manifest(tmp_path / "a.zarr").batch_size == preferred_batch_size("cpu", 24 * 24) == 64
    assert "is used" not in caplog.text


def test_large_frames_make_small_batches(tmp_path):
    path = make_dataset(tmp_path / "large.hdf5", lengths=(2, 2), cameras={CAMERA: (720, 1280, 3)}, compression=None)
    extract(tmp_path / "a.zarr", path, batch_size=None)
    assert read_manifest(tmp_path / "a.zarr").batch_size == 3


def test_the_plan_says_the_memory(dataset, tmp_path):
    plan = plan_extraction(config(tmp_path / "a.zarr", dataset))
    assert plan.memory is not None
    assert 10**8 < plan.memory < 10**11
    assert any("GB of memory at most" in line for line in plan.lines())
    extract(tmp_path / "a.zarr", dataset)
    assert plan_extraction(config(tmp_path / "a.zarr", dataset)).memory is None  # nothing is left to encode


def not_opened(*args, **options):
    raise AssertionError("the dataset was opened and read again")


def test_a_rerun_and_verify_read_no_metadata_of_unchanged_files(dataset, tmp_path, monkeypatch):
    out = tmp_path / "a.zarr"
    extract(out, dataset)
    before = outputs(out)
    monkeypatch.setattr(Dataset, "open", not_opened)
    result = extract(out, dataset)
    assert result.units_encoded == 0
    assert outputs(out) == before
    assert verify(out, rows=5, encoder=config(out, dataset).encoders.factory).ok


@pytest.mark.parametrize("change", ["time", "request", "filter key", "deep"])
def test_any_change_reads_the_files_again(dataset, tmp_path, monkeypatch, change):
    out = tmp_path / "a.zarr"
    extract(out, dataset)
    options = {"request": {"low_dim_keys": ("object",)}, "filter key": {"filter_key": "train"}, "deep": {"deep": True}}
    if change == "time":
        os.utime(dataset, ns=(1, 1))
    monkeypatch.setattr(Dataset, "open", not_opened)
    with pytest.raises(AssertionError, match="opened and read again"):
        extract(out, dataset, **options.get(change, {}))


def test_a_default_choice_sees_a_new_camera(dataset, tmp_path):
    out = tmp_path / "a.zarr"
    extract(out, dataset)
    with h5py.File(dataset, "r+") as file:
        for demo in file["data"].values():
            demo["obs/wrist_image"] = demo[f"obs/{CAMERA}"][()]
    extract(out, dataset)
    assert "wrist_image" in read_manifest(out).cameras


def test_explicit_low_dim_keys_do_not_become_the_default(dataset, tmp_path):
    out = tmp_path / "a.zarr"
    extract(out, dataset, low_dim_keys=("object",))
    extract(out, dataset)
    assert "robot0_eef_pos" in read_manifest(out).low_dim
