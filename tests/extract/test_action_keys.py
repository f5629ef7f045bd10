"""``--action-key``: which arrays are the actions, in the cache's identity, in runs and in robomimic's configs."""

import json

import h5py
import numpy as np
import pytest

from cache_pipeline.cache.manifest_store import read_manifest
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.errors import ConfigError, DatasetError, StaleCacheError
from cache_pipeline.extract.verify import verify
from tests.cache_fakes import extract, outputs
from tests.fakes import make_dataset

ABS = ("actions_abs",)
PARTS = ("action_dict/abs_pos", "action_dict/gripper", "action_dict/abs_rot_6d")


def joined(demo, keys):
    return np.concatenate([demo[key][()].reshape(len(demo["actions"]), -1) for key in keys], axis=1).astype(np.float32)


@pytest.fixture
def path(tmp_path):
    path = make_dataset(tmp_path / "lift.hdf5")
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            actions = demo["actions"][()]
            demo["actions_abs"] = actions + 2
            demo["action_dict/abs_pos"] = actions[:, :3]
            demo["action_dict/abs_rot_6d"] = np.tile(actions[:, 3:6], 2)
            demo["action_dict/gripper"] = actions[:, 6]
    return path


@pytest.mark.parametrize("keys", [("actions",), ABS, PARTS])
def test_the_named_arrays_are_the_actions_side_by_side(path, keys):
    with Dataset.open(path, action_key=keys) as dataset, h5py.File(path) as file:
        for number, demo in enumerate(dataset.demos):
            expected = joined(file["data"][demo.name], keys)
            assert dataset.action_dim == expected.shape[1]
            np.testing.assert_array_equal(dataset.rows(number)["actions"], expected)
        assert dataset.choice.lines()[0].endswith(f"action key{'s' * (len(keys) > 1)} {', '.join(keys)}")


def test_an_unknown_key_lists_the_others(path):
    with pytest.raises(
        DatasetError, match=r"no action key 'actions_abd'; available: actions, .*did you mean actions_abs"
    ):
        Dataset.open(path, action_key=["actions_abd"])


def test_arrays_of_several_lengths_and_broken_values_are_refused(path):
    with h5py.File(path, "r+") as file:
        file["data/demo_1/action_dict/gripper"][2] = np.nan
    with pytest.raises(DatasetError, match="demo_1: action_dict/gripper is nan at frame 2"):
        Dataset.open(path, action_key=PARTS)
    with h5py.File(path, "r+") as file:
        del file["data/demo_1/action_dict/gripper"]
        file["data/demo_1/action_dict/gripper"] = np.zeros(3)
    with pytest.raises(DatasetError, match="demo_1: actions are arrays of several lengths"):
        Dataset.open(path, action_key=PARTS)
    assert Dataset.open(path).action_dim == 7


def test_a_file_without_actions_names_the_keys_that_it_has(path):
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            del demo["actions"]
    with pytest.raises(DatasetError, match=r"no actions; --action-key chooses others; available: .*actions_abs"):
        Dataset.open(path)
    assert Dataset.open(path, action_key=ABS).action_dim == 7


def test_the_action_key_belongs_to_the_identity_of_a_cache(path, tmp_path):
    plain, absolute = tmp_path / "plain.zarr", tmp_path / "abs.zarr"
    extract(plain, path)
    assert "action_keys" not in json.loads((plain / "manifest.json").read_text())
    extract(absolute, path, action_key=ABS)
    cache = FeatureCache(absolute)
    with h5py.File(path) as file:
        expected = np.concatenate([joined(file["data"][demo.name], ABS) for demo in cache.demos])
    np.testing.assert_array_equal(cache.array("actions"), expected)
    assert cache.fingerprint != FeatureCache(plain).fingerprint
    for out, asked in ((plain, ABS), (absolute, None)):
        with pytest.raises(StaleCacheError, match="action_key is") as error:
            extract(out, path, action_key=asked)
        assert "come from other arrays" in str(error.value)
    again = extract(absolute, path, action_key=ABS)
    assert (again.units_encoded, read_manifest(absolute).action_keys) == (0, ABS)


def test_verify_and_moved_files_keep_the_action_key(path, tmp_path):
    out = tmp_path / "abs.zarr"
    extract(out, path, action_key=PARTS)
    before = outputs(out)
    moved = path.rename(tmp_path / "moved.hdf5")
    assert verify(out, datasets=(moved,), rows=4, device="cpu", encoder=_factory()).ok
    assert extract(out, moved, action_key=PARTS).units_encoded == 0
    assert outputs(out)["units"] == before["units"]


def _factory():
    from tests.cache_fakes import TINY

    return TINY.factory


def test_an_unfinished_cache_of_other_actions_is_not_continued(path, tmp_path):
    out = tmp_path / "part.zarr"
    extract(out, path)
    (out / "manifest.json").rename(out / "pending.json")
    with pytest.raises(StaleCacheError, match="action_key"):
        extract(out, path, action_key=ABS)
    extract(out, path, action_key=ABS, overwrite=True)
    assert read_manifest(out).action_keys == ABS


def test_a_cache_holds_the_actions_of_one_key(path, tmp_path):
    from cache_pipeline.training.data.run_data import DemoChoice, open_cache_data

    out = tmp_path / "abs.zarr"
    extract(out, path, action_key=ABS)
    assert open_cache_data(out, None, None, DemoChoice(), ABS).record.action_keys == ABS
    with pytest.raises(
        ConfigError, match=r"action key actions_abs, not actions; extract another cache with --action-key"
    ):
        open_cache_data(out, None, None, DemoChoice(), ("actions",))
