"""What the recorders of HDF5 files add to robomimic's layout: the task in words, and upside-down frames."""

import json

import h5py
import numpy as np
import pytest

from cache_pipeline.cache.manifest import Manifest
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.demos.summary import inspect_dataset
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.errors import StaleCacheError
from cache_pipeline.extract.matching import recorded_dataset
from tests.cache_fakes import CAMERA, equal, extract
from tests.fakes import make_dataset

TASK = "open the middle drawer of the cabinet"


@pytest.fixture
def path(tmp_path):
    return make_dataset(tmp_path / "lift.hdf5", masks={})


def libero(file):
    file["data"].attrs["problem_info"] = json.dumps({"problem_name": "x", "language_instruction": TASK})


def libero_in_letters(file):
    file["data"].attrs["problem_info"] = json.dumps({"language_instruction": list(TASK)})


def robocasa(file):
    for demo in file["data"].values():
        demo.attrs["ep_meta"] = json.dumps({"lang": TASK, "layout_id": 3})


def plain(file):
    for demo in file["data"].values():
        demo.attrs["task_description"] = np.bytes_(TASK)


@pytest.mark.parametrize(
    ("write", "layout"),
    [(libero, "LIBERO"), (libero_in_letters, "LIBERO"), (robocasa, "RoboCasa"), (plain, "robomimic")],
)
def test_the_task_is_read_shown_and_kept_in_the_cache(path, tmp_path, write, layout):
    with h5py.File(path, "r+") as file:
        write(file)
    with Dataset.open(path) as dataset:
        assert [demo.task for demo in dataset.demos] == [TASK] * 3
    summary = inspect_dataset(path)
    assert summary.files[0].tasks == {TASK: 3}
    assert f"  task          {TASK} (3 demos)" in summary.lines()
    assert f"  layout        {layout} HDF5" in summary.lines()
    extract(tmp_path / "lift.zarr", path)
    cache = FeatureCache(tmp_path / "lift.zarr")
    assert cache.tasks == (TASK,) * 3
    assert [demo.task for demo in recorded_dataset(cache.manifest).demos] == [TASK] * 3


@pytest.mark.parametrize("value", ["no json", json.dumps([1]), json.dumps({"lang": 3}), "", None])
def test_a_task_that_is_no_text_is_none(path, value):
    if value is not None:
        with h5py.File(path, "r+") as file:
            file["data/demo_0"].attrs["ep_meta"] = value
    assert Dataset.open(path).demos[0].task is None
    assert inspect_dataset(path).files[0].tasks == {}


def test_a_manifest_without_tasks_layouts_and_action_keys_is_that_of_earlier_versions(path, tmp_path):
    extract(tmp_path / "lift.zarr", path)
    value = json.loads((tmp_path / "lift.zarr" / "manifest.json").read_text())
    assert all(len(demo) == 6 for demo in value["demos"])
    assert len(value["files"][0]) == 3
    manifest = Manifest.from_json(value)
    assert (manifest.demos[0].task, manifest.files[0].layout, manifest.action_keys) == (None, "hdf5", ("actions",))
    assert "actions" not in value["asked"]["choice"]


def test_frames_stored_upside_down_are_told_and_flip_turns_them_upright(tmp_path):
    upright, flipped = make_dataset(tmp_path / "up.hdf5"), make_dataset(tmp_path / "down.hdf5")
    with h5py.File(flipped, "r+") as file:
        file["data"].attrs["macros_image_convention"] = "opengl"
        for demo in file["data"].values():
            for camera in (CAMERA, "robot0_eye_in_hand_image"):
                demo[f"obs/{camera}"][...] = demo[f"obs/{camera}"][()][:, ::-1]
    (note,) = (note for note in inspect_dataset(flipped).files[0].notes if "upside down" in note)
    assert "--flip" in note
    assert not any("upside down" in note for note in inspect_dataset(upright).files[0].notes)
    extract(tmp_path / "up.zarr", upright)
    extract(tmp_path / "down.zarr", flipped, preprocess=Preprocess(flip=True))
    up, down = FeatureCache(tmp_path / "up.zarr"), FeatureCache(tmp_path / "down.zarr")
    assert equal(up.features(CAMERA), down.features(CAMERA))
    assert "flip" not in up.cameras[CAMERA].identity["preprocess"]
    assert down.cameras[CAMERA].identity["preprocess"]["flip"] is True
    with pytest.raises(StaleCacheError, match=r"preprocess\.flip is True in the cache and None now"):
        extract(tmp_path / "down.zarr", flipped)
