import json
import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from cache_fakes import CAMERA, equal, extract
from fakes import make_dataset

from cache_pipeline.cache.export import export_npz, export_robomimic
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.errors import ConfigError


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    dataset = make_dataset(folder / "demos.hdf5", lengths=(7, 5), names=["demo_2", "demo_10"])
    extract(folder / "cache.zarr", dataset, views=2)
    return FeatureCache(folder / "cache.zarr")


def test_robomimic_reads_the_export_and_gives_the_features_as_obs(cache, tmp_path):
    dataset = pytest.importorskip("robomimic.utils.dataset")
    export_robomimic(cache.path, tmp_path / "features.hdf5")
    keys = ("agentview_feature", "robot0_eef_pos")
    sequences = dataset.SequenceDataset(
        str(tmp_path / "features.hdf5"),
        obs_keys=keys,
        dataset_keys=("actions", "rewards", "dones"),
        seq_length=2,
        hdf5_cache_mode=None,
        filter_by_attribute="train",
    )
    assert len(sequences) == 7
    assert np.array_equal(sequences[1]["obs"]["agentview_feature"][0], cache.features(CAMERA, slice(1, 2))[0])
    assert np.array_equal(sequences[1]["actions"], cache.array("actions", slice(1, 3)))
    sequences.close_and_delete_hdf5_handle()


def test_robomimics_own_train_script_trains_on_the_export_with_the_documented_config(cache, tmp_path):
    pytest.importorskip("robomimic")
    export_robomimic(cache.path, tmp_path / "features.hdf5")
    document = (Path(__file__).parents[2] / "docs" / "robomimic.md").read_text(encoding="utf-8")
    config = json.loads(re.search(r"```json\n(.*?)```", document, re.DOTALL)[1])
    config["observation"]["modalities"]["obs"]["low_dim"].remove("robot0_eef_quat")  # not in the fake dataset
    config["train"] |= {"data": str(tmp_path / "features.hdf5"), "output_dir": str(tmp_path / "runs")}
    config["train"] |= {"batch_size": 4, "num_epochs": 1}
    config["experiment"] |= {"epoch_every_n_steps": 3, "validation_epoch_every_n_steps": 1}
    config["experiment"] |= {"save": {"every_n_epochs": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "robomimic.scripts.train", "--config", str(tmp_path / "config.json")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert output.rstrip().endswith("finished run successfully!"), output[-2000:]
    assert len(list((tmp_path / "runs").rglob("model_epoch_1.pth"))) == 1


def test_the_export_keeps_demos_masks_and_environment(cache, tmp_path):
    result = export_robomimic(cache.path, tmp_path / "features.hdf5", views=True)
    assert set(result.keys) >= {"agentview_feature", "agentview_feature_view1", "robot0_eef_pos"}
    with h5py.File(tmp_path / "features.hdf5") as file:
        assert set(file["data"]) == {"demo_2", "demo_10"}
        assert file["mask/valid"][()].tolist() == [b"demo_10"]
        assert "Lift" in file["data"].attrs["env_args"]
        assert file["data/demo_10"].attrs["num_samples"] == 5


def test_npz_holds_every_array_with_its_views(cache, tmp_path):
    export_npz(cache.path, tmp_path / "features.npz")
    with np.load(tmp_path / "features.npz") as arrays:
        assert equal(arrays[f"features/{CAMERA}"][1], cache.features(CAMERA, view=1))
        assert arrays["demos"].tolist() == ["demo_2", "demo_10"]
        assert arrays["starts"].tolist() == [0, 7]


def test_npz_keeps_the_filter_keys(tmp_path):
    masks = {"train": ["demo_2", "demo_5"], "valid": ["demo_10"], "20_percent": ["demo_5", "gone"]}
    dataset = make_dataset(tmp_path / "d.hdf5", lengths=(7, 5, 4), names=["demo_2", "demo_5", "demo_10"], masks=masks)
    extract(tmp_path / "c.zarr", dataset)
    export_npz(tmp_path / "c.zarr", tmp_path / "features.npz")
    with np.load(tmp_path / "features.npz") as arrays:
        found = {name.removeprefix("mask/"): arrays[name] for name in arrays.files if name.startswith("mask/")}
        assert {key: arrays["demos"][numbers].tolist() for key, numbers in found.items()} == {
            key: [name for name in members if name != "gone"] for key, members in masks.items()
        }
        assert arrays["lengths"][found["valid"]].tolist() == [4]


@pytest.mark.parametrize("export", [export_robomimic, export_npz])
def test_a_file_that_is_there_is_replaced_only_when_asked(cache, tmp_path, export):
    out = tmp_path / "out"
    out.write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="left alone even with --overwrite"):
            export(cache.path, out, overwrite=overwrite)
    assert out.read_text() == "precious"
    out.unlink()
    export(cache.path, out)
    with pytest.raises(ConfigError, match="replace it with --overwrite"):
        export(cache.path, out)
    export(cache.path, out, overwrite=True)
