"""Every bad input gives one clear line on stderr and exit 1, before any work, and harms nothing that was there."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from fakes import make_dataset
from typer.testing import CliRunner

from cache_pipeline.cli import app

RANDOM = ["--no-pretrained-encoder", "--device", "cpu", "--precision", "fp32"]


def run(*args):
    return CliRunner().invoke(app, ["--quiet", *map(str, args)])


def extract(dataset, out, *args):
    return run("extract-features", dataset, "--out", out, *RANDOM, *args)


def the_error(result):
    assert result.exit_code == 1, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert result.stdout == ""
    return lines[0]


def snapshot(folder: Path):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A dataset, a cache of it and a run trained on the cache."""
    folder = tmp_path_factory.mktemp("made")
    dataset, cache, trained = folder / "data.hdf5", folder / "data.zarr", folder / "run"
    make_dataset(dataset)
    assert extract(dataset, cache).exit_code == 0
    result = run("train", "--from-cache", cache, "--out", trained, "--steps", 2, "--batch-size", 4, "--device", "cpu")
    assert result.exit_code == 0, result.output
    return dataset, cache, trained


def broken(tmp_path, change):
    path = make_dataset(tmp_path / "broken.hdf5")
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def replace(group, name, value):
    del group[name]
    group[name] = value


def cut_actions(file):
    demo = file["data/demo_1"]
    replace(demo, "actions", demo["actions"][:-1])


def put_nan(file):
    file["data/demo_1/actions"][2, 3] = np.nan


def float_images(file):
    obs = file["data/demo_1/obs"]
    replace(obs, "agentview_image", obs["agentview_image"][:].astype(np.float32) / 255)


def no_cameras(file):
    for demo in file["data"].values():
        for camera in ("agentview_image", "robot0_eye_in_hand_image"):
            del demo["obs"][camera]


def absent_demos(file):
    file["mask/more"] = np.array([b"demo_77", b"demo_78"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (cut_actions, ["demo_1", "actions"]),
        (put_nan, ["demo_1", "actions", "2"]),
        (float_images, ["demo_1", "agentview_image", "float32"]),
        (no_cameras, ["camera"]),
        (lambda file: file.move("data", "dataset"), ["data"]),
    ],
    ids=["lengths of obs and actions differ", "NaN actions", "float images", "no cameras", "no data group"],
)
def test_an_unsound_file_is_refused_where_it_is_unsound(tmp_path, change, words):
    path = broken(tmp_path, change)
    error = the_error(extract(path, tmp_path / "out.zarr"))
    assert all(word in error for word in ["broken.hdf5", *words]), error
    assert not (tmp_path / "out.zarr").exists()


def test_a_missing_file_is_named(tmp_path):
    assert "nowhere.hdf5" in the_error(extract(tmp_path / "nowhere.hdf5", tmp_path / "out.zarr"))


@pytest.mark.parametrize(
    "words",
    [
        "inspect LOOP",
        "extract-features LOOP --out NEW",
        "extract-features DATASET --out LOOP",
        "extract-features DATASET --out LOOP/new.zarr",
        "train --dataset LOOP --out NEW",
        "train --from-cache CACHE --dataset LOOP --out NEW",
        "train --from-cache LOOP --out NEW",
        "train --from-cache CACHE --out LOOP",
        "train --from-cache CACHE --out LOOP/new",
        "train --config LOOP",
        "finetune --live-encoder --checkpoint LOOP",
        "finetune --live-encoder --checkpoint TRAINED --out LOOP",
        "verify LOOP",
        "verify CACHE --dataset LOOP",
        "cache compact LOOP",
        "report TRAINED --out LOOP",
        "collect --out LOOP",
    ],
)
def test_a_circular_link_is_one_line(tmp_path, made, words):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    places = dict(zip(("DATASET", "CACHE", "TRAINED"), made, strict=True), LOOP=loop, NEW=tmp_path / "new")
    for name, place in places.items():
        words = words.replace(name, str(place))
    assert "loop" in the_error(run(*words.split()))
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


def test_a_text_file_is_no_hdf5(tmp_path):
    (tmp_path / "notes.hdf5").write_text("not an HDF5 file")
    assert "notes.hdf5" in the_error(extract(tmp_path / "notes.hdf5", tmp_path / "out.zarr"))


def test_a_truncated_hdf5_is_refused(tmp_path):
    path = make_dataset(tmp_path / "whole.hdf5")
    (tmp_path / "cut.hdf5").write_bytes(path.read_bytes()[:-4096])
    assert "cut.hdf5" in the_error(extract(tmp_path / "cut.hdf5", tmp_path / "out.zarr"))


def test_a_wrong_camera_lists_the_right_ones(tmp_path, made):
    error = the_error(extract(made[0], tmp_path / "out.zarr", "--cameras", "agentview"))
    assert "agentview_image" in error
    assert "robot0_eye_in_hand_image" in error


def test_a_wrong_filter_key_lists_the_right_ones(tmp_path, made):
    error = the_error(extract(made[0], tmp_path / "out.zarr", "--filter-key", "trian"))
    assert "train" in error
    assert "valid" in error


def test_a_filter_key_whose_demos_are_all_absent_is_refused(tmp_path):
    path = broken(tmp_path, absent_demos)
    assert "names 2 demos, and none of them is in the file" in the_error(
        extract(path, tmp_path / "out.zarr", "--filter-key", "more")
    )


def test_a_cache_from_other_weights_is_stale_and_stays_as_it_was(made):
    dataset, cache, _ = made
    before = snapshot(cache)
    error = the_error(extract(dataset, cache, "--seed", 1))
    assert "stale" in error
    assert "weights" in error
    assert "--overwrite" in error
    assert snapshot(cache) == before


def test_a_cache_cut_off_half_way_is_not_trained_on(tmp_path, made):
    out = tmp_path / "half.zarr"
    assert extract(made[0], out).exit_code == 0
    (out / "manifest.json").rename(out / "pending.json")
    assert "extract-features" in the_error(run("train", "--from-cache", out, "--out", tmp_path / "run", "--steps", 1))
    assert not (tmp_path / "run").exists()


def test_training_on_what_is_no_cache_says_how_to_make_one(tmp_path):
    error = the_error(run("train", "--from-cache", tmp_path, "--out", tmp_path / "run"))
    assert "extract-features" in error


def test_a_checkpoint_that_does_not_fit_the_dataset_is_told_by_name(tmp_path, made):
    other = make_dataset(tmp_path / "other.hdf5", cameras={"frontview_image": (24, 24, 3)})
    arguments = ["finetune", "--live-encoder", "--checkpoint", made[2], "--dataset", other, "--out", tmp_path / "run"]
    error = the_error(run(*arguments, "--steps", 1))
    assert "agentview_image" in error
    assert "frontview_image" in error
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten_unasked(made):
    _, cache, trained = made
    before = snapshot(trained)
    error = the_error(run("train", "--from-cache", cache, "--out", trained, "--steps", 1))
    assert "--overwrite" in error
    assert "--resume" in error
    assert snapshot(trained) == before


def test_a_hostile_checkpoint_is_refused(tmp_path, made):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(made[2], copy)
    for file in copy.rglob("model.safetensors"):
        file.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR." + bytes(64))
    error = the_error(run("finetune", "--live-encoder", "--checkpoint", copy, "--out", tmp_path / "run", "--steps", 1))
    assert "model.safetensors" in error


def test_nothing_to_do_is_said_with_the_command():
    assert "extract-features" in the_error(run("extract-features"))
    assert "--from-cache" in the_error(run("train"))


def test_an_unknown_option_is_a_usage_error():
    assert run("train", "--no-such-option").exit_code == 2


def test_json_is_one_object_and_nothing_else(tmp_path, made):
    dataset, cache, trained = made
    result = extract(dataset, cache, "--json")
    value = json.loads(result.stdout)
    assert set(value) == {
        *("cache", "images", "cameras", "seconds", "images_per_s", "read_s", "encode_s", "write_s"),
        *("bytes", "units_encoded", "units_reused", "units_missing", "part", "fingerprint"),
    }
    assert value["units_encoded"] == 0
    assert value["units_reused"] > 0
    for path in (dataset, cache, trained):
        assert json.loads(run("inspect", path, "--json").stdout)
    assert set(json.loads(run("verify", cache, "--json").stdout)) >= {"rows", "max_abs", "max_rel", "tolerance", "ok"}
