"""inspect says whether a thing is sound by its exit code: 0, or 3 after printing all that it found."""

import json

import h5py
import numpy as np
import pytest
from cache_fakes import TINY, extract
from fakes import make_dataset
from typer.testing import CliRunner

from cache_pipeline.cli import app
from cache_pipeline.reports.inspection import inspect_path

TRAIN = ["--steps", 2, "--batch-size", 4, "--emb-dim", 8, "--device", "cpu", "--encoder", TINY.factory]


def run(*args):
    return CliRunner().invoke(app, ["--quiet", *map(str, args)])


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "data.hdf5")


@pytest.fixture
def cache(dataset, tmp_path):
    extract(tmp_path / "data.zarr", dataset)
    return tmp_path / "data.zarr"


@pytest.fixture
def trained(cache, tmp_path):
    result = run("train", "--from-cache", cache, "--out", tmp_path / "run", *TRAIN)
    assert result.exit_code == 0, result.output
    return tmp_path / "run"


def unsound(path, *words, command=("inspect",)):
    result = run(*command, path)
    assert result.exit_code == 3, result.output
    assert str(path) in result.stdout
    assert result.stderr.startswith(f"error: {path} is not sound: ")
    assert len(result.stderr.splitlines()) == 1
    as_json = run(*command, path, "--json")
    assert as_json.exit_code == 3
    value = json.loads(as_json.stdout)
    assert value["sound"] is False
    assert all(any(word in problem for problem in value["problems"]) for word in words), value["problems"]
    return value


def test_sound_things_exit_with_0(dataset, cache, trained):
    for path in (dataset, cache, trained, next((trained / "checkpoints").glob("step_*"))):
        result = run("inspect", path, "--json")
        assert (result.exit_code, json.loads(result.stdout)["sound"]) == (0, True), result.output
    assert run("cache", "inspect", cache).exit_code == 0


def test_an_unsound_dataset_is_still_told(dataset):
    with h5py.File(dataset, "r+") as file:
        file["data/demo_1/actions"][2, 3] = np.nan
        del file["data/demo_0/obs/robot0_eef_pos"]
    value = unsound(dataset, "demo_1: actions is nan", "demo_0 lacks the low-dim key")
    assert value["demos"] == 3


def test_a_cut_off_dataset_is_unsound_and_a_text_file_or_nothing_an_error(dataset, tmp_path):
    dataset.write_bytes(dataset.read_bytes()[:-4096])
    unsound(dataset, "is cut off")
    (tmp_path / "notes.txt").write_text("no dataset")
    for path in (tmp_path / "notes.txt", tmp_path / "nothing", tmp_path):
        assert run("inspect", path).exit_code == 1


@pytest.mark.parametrize("command", [("inspect",), ("cache", "inspect")])
def test_a_corrupt_or_unfinished_cache_is_still_told(cache, command):
    (cache / "ledger/steps/0.json").rename(cache / "record")
    assert unsound(cache, "ledger", command=command)["demos"] == 3
    (cache / "record").rename(cache / "ledger/steps/0.json")
    (cache / "manifest.json").rename(cache / "pending.json")
    unsound(cache, "unfinished", command=command)


def test_a_run_with_a_damaged_or_missing_file_is_still_told(trained):
    checkpoint = next((trained / "checkpoints").glob("step_*"))
    (checkpoint / "model.safetensors").write_bytes(b"no tensors")
    assert unsound(trained, "model.safetensors is damaged")["policy"] == "flow"
    (trained / "encoder.safetensors").write_bytes(b"\x10")
    unsound(trained, "model.safetensors is damaged", "encoder.safetensors cannot be read")
    (trained / "run.json").write_text("{")
    unsound(trained, "run.json is damaged")


def test_the_encoder_of_a_run_is_never_built_to_inspect_it(trained, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("inspect built an encoder")

    for name in ("saving.load_encoder", "factory.call_factory"):
        monkeypatch.setattr(f"cache_pipeline.encoders.{name}", refuse)
    assert not inspect_path(trained).problems


def test_extraction_and_training_say_what_they_take_and_leave_out(dataset, cache, tmp_path):
    def said(*args):
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exit_code == 0, result.output
        return result.stderr

    key = "agentview_image"
    taken = f"used: cameras {key}; low-dim keys robot0_eef_pos, robot0_gripper_qpos; action key actions"
    extracting = said(
        "extract-features", dataset, "--out", tmp_path / "one.zarr", "--no-pretrained-encoder", "--cameras", key
    )
    assert taken in extracting
    assert "left out: cameras robot0_eye_in_hand_image; low-dim keys object" in extracting
    training = said(
        "train", "--from-cache", cache, "--out", tmp_path / "one", "--cameras", key, "--low-dim-keys", "none", *TRAIN
    )
    assert f"used: cameras {key}; low-dim keys none; action key actions" in training
    assert "left out: cameras robot0_eye_in_hand_image; low-dim keys robot0_eef_pos" in training
