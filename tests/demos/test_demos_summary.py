"""Notes of inspect on sound and unusual files; unsound files are in test_demos_bad_input.py."""

import json
import subprocess
import sys

import h5py
import numpy as np
import pytest
from fakes import make_dataset

from cache_pipeline.demos.summary import inspect_dataset
from cache_pipeline.errors import DatasetError


@pytest.fixture
def path(tmp_path):
    return make_dataset(tmp_path / "lift.hdf5")


def notes_of(path):
    summary = inspect_dataset(path)
    assert summary.sound, summary.files[0].problems
    return summary.files[0].notes


def test_a_clean_file_has_neither_problems_nor_notes(path):
    summary = inspect_dataset(path)
    assert summary.sound
    assert summary.files[0].problems == summary.files[0].notes == summary.problems == summary.notes == ()
    assert summary.lines()[-1] == "sound"


def test_counts_sizes_and_ranges_are_those_of_the_file(path):
    file = inspect_dataset(path).files[0]
    assert (file.demos, file.steps, file.episode_length) == (3, 21, (5, 7.0, 9))
    assert file.bytes == path.stat().st_size
    camera = file.cameras["agentview_image"]
    assert (camera.height, camera.width, camera.compression) == (24, 24, "gzip-4")
    assert camera.raw_bytes == 21 * 24 * 24 * 3
    assert 0 < camera.stored_bytes < camera.raw_bytes
    assert file.low_dim == {"object": 4, "robot0_eef_pos": 3, "robot0_gripper_qpos": 2}
    assert file.filter_keys == {"train": 2, "valid": 1}
    assert file.env_args["env_name"] == "Lift"
    with h5py.File(path) as stored:
        actions = np.concatenate([stored[f"data/demo_{i}/actions"][()] for i in range(3)])
    np.testing.assert_allclose(file.actions.min, actions.min(axis=0), rtol=1e-5)
    np.testing.assert_allclose(file.actions.max, actions.max(axis=0), rtol=1e-5)


def test_the_summary_is_json_and_its_lines_name_the_main_facts(path):
    summary = inspect_dataset(path)
    value = json.loads(json.dumps(summary.to_json(), allow_nan=False))
    assert value["sound"] is True
    assert (value["demos"], value["steps"]) == (3, 21)
    assert value["files"][0]["cameras"]["agentview_image"]["height"] == 24
    text = "\n".join(summary.lines())
    for word in (str(path), "5 / 7 / 9", "agentview_image 24×24", "robot0_eef_pos 3", "dim 7", "train 2", "Lift 1.5.2"):
        assert word in text


def test_actions_beyond_one_are_a_note_and_allowed(path):
    with h5py.File(path, "r+") as file:
        file["data/demo_1/actions"][2:4, 5] = -1.25
    assert notes_of(path) == ("actions are beyond ±1 in 2 steps (dims 5)",)


def test_constant_action_dims_are_a_note(path):
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            demo["actions"][:, 3:5] = 0.5
    assert notes_of(path) == ("actions never change in dims 3, 4",)
    assert inspect_dataset(path).files[0].actions.constant_dims == (3, 4)


def test_absent_env_args_and_filter_keys_that_name_absent_demos_are_two_short_notes(tmp_path):
    masks = {f"{i}_percent": [f"demo_{j}" for j in range(i)] for i in range(1, 43)}
    path = make_dataset(tmp_path / "part.hdf5", lengths=(7,), masks=masks, env_args=None, total=False)
    first, second = notes_of(path)
    assert "no env_args" in first
    assert "41 of 42 filter keys name demos that are not in the file" in second
    assert len(second) < 250
    file = inspect_dataset(path).files[0]
    assert file.filter_keys == {"1_percent": 1}
    assert file.absent_filter_keys["20_percent"] == (1, 20)


def test_gaps_and_names_without_numbers_are_notes(tmp_path):
    path = make_dataset(tmp_path / "gaps.hdf5", names=["demo_3", "demo_12", "best"], masks={})
    assert notes_of(path) == (
        "names that are not demo_<number>: best",
        "demo numbers have gaps: 2 demos between 3 and 12",
    )


def test_wrong_counts_are_notes_and_the_number_of_actions_is_used(path):
    with h5py.File(path, "r+") as file:
        file["data"].attrs["total"] = 20
        file["data/demo_0"].attrs["num_samples"] = 8
        del file["data/demo_1"].attrs["num_samples"]
    assert notes_of(path) == (
        "data.attrs total is 20, but there are 21 steps",
        "no num_samples in 1 of 3 demos (demo_1)",
        "num_samples is not the number of actions in 1 demos (demo_0 says 8 of 7)",
    )


def test_env_args_that_are_not_a_json_object_are_a_note_and_left_out(path):
    for text, word in (("{broken", "not JSON"), ("[1]", "not a JSON object")):
        with h5py.File(path, "r+") as file:
            file["data"].attrs["env_args"] = text
        assert word in notes_of(path)[0]
        assert inspect_dataset(path).files[0].env_args is None


def test_a_filter_key_that_is_not_a_list_of_names_is_a_note_and_left_out(path):
    with h5py.File(path, "r+") as file:
        file["mask/odd"] = np.zeros((2, 2))
        file["mask/empty"] = np.array([], dtype="S8")
        file.create_group("mask/nested")
    first, second, third = notes_of(path)
    assert "'nested' cannot be read" in first
    assert "'odd' cannot be read" in second
    assert third == "filter keys without demos: empty"


def test_missing_rewards_and_dones_are_notes(path):
    with h5py.File(path, "r+") as file:
        del file["data/demo_1/rewards"], file["data/demo_2/dones"]
    assert notes_of(path) == (
        "no rewards in 1 of 3 demos (demo_1): read as NaN",
        "no dones in 1 of 3 demos (demo_2): read as NaN",
    )


def test_obs_that_are_neither_images_nor_low_dim_are_a_note(path):
    with h5py.File(path, "r+") as file:
        file["data/demo_0/obs/depth"] = np.zeros((7, 24, 24, 1), np.float32)
    assert notes_of(path) == ("obs that are neither an rgb image nor low-dim: depth float32 (7, 24, 24, 1)",)


def test_cameras_that_are_black_or_frozen_through_a_demo_are_named_unless_one_frame_differs(tmp_path):
    path = make_dataset(tmp_path / "still.hdf5", lengths=(7, 5, 9, 8, 1), masks={})
    with h5py.File(path, "r+") as file:
        obs = [file[f"data/demo_{i}/obs"] for i in range(4)]
        obs[0]["agentview_image"][:] = 0
        obs[1]["agentview_image"][:] = obs[1]["agentview_image"][:1]
        obs[1]["robot0_eye_in_hand_image"][:] = 9
        obs[2]["agentview_image"][:] = obs[2]["agentview_image"][:1]
        obs[2]["agentview_image"][3] = 1
        obs[3]["agentview_image"][:] = 0
    assert notes_of(path) == (
        "camera agentview_image is black through 2 whole demos (demo_0, demo_3)",
        "camera agentview_image is frozen on one frame through 1 whole demo (demo_1)",
        "camera robot0_eye_in_hand_image is frozen on one frame through 1 whole demo (demo_1)",
    )


def test_cameras_without_frames_or_with_damaged_frames_are_not_reported_as_frozen(path):
    with h5py.File(path, "r+") as file:
        obs = file["data/demo_1/obs"]
        del obs["agentview_image"], obs["robot0_eye_in_hand_image"]
        obs["agentview_image"] = np.zeros((0, 24, 24, 3), np.uint8)
        obs["robot0_eye_in_hand_image"] = h5py.SoftLink("/nowhere")
    summary = inspect_dataset(path)
    assert not summary.sound
    assert not any("through" in note for note in summary.files[0].notes)


def test_a_file_without_cameras_is_sound_and_has_a_note(tmp_path):
    assert "no cameras" in notes_of(make_dataset(tmp_path / "low_dim.hdf5", cameras={}))[0]


def test_render_flags_are_shown(tmp_path):
    path = make_dataset(tmp_path / "lift.hdf5", render_flags={"shadow": False})
    assert any("shadow False" in line for line in inspect_dataset(path).lines())


def test_many_problems_are_all_in_the_json_and_few_in_the_lines(tmp_path):
    path = make_dataset(tmp_path / "lift.hdf5", lengths=(3,) * 30)
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            demo["actions"][0, 0] = np.nan
    summary = inspect_dataset(path)
    assert len(summary.to_json()["files"][0]["problems"]) == 30
    assert sum("PROBLEM" in line for line in summary.lines()) == 13
    assert any("and 18 more" in line for line in summary.lines())
    assert summary.lines()[-1].startswith("NOT SOUND")


def test_several_files_are_counted_together_and_different_environments_are_a_note(path, tmp_path):
    second = make_dataset(tmp_path / "can.hdf5", lengths=(4,), env_args={"env_name": "Can"})
    summary = inspect_dataset([path, second])
    assert summary.sound
    assert (summary.demos, summary.steps) == (4, 25)
    assert summary.notes == ("env_args of the files differ, so none are used",)
    assert any("together: 2 files, 4 demos, 25 steps" in line for line in summary.lines())


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path):
    with pytest.raises(DatasetError, match="no file"):
        inspect_dataset(tmp_path / "gone.hdf5")


def test_the_demos_package_does_not_import_torch():
    code = """
import sys
from cache_pipeline.demos import dataset, split, summary, windows
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_quaternions_that_change_their_sign_are_told(tmp_path):
    path = make_dataset(tmp_path / "lift.hdf5")
    turned = np.linspace(0, 1, 9)
    smooth = np.stack([np.cos(turned), np.sin(turned), 0 * turned, 0 * turned], axis=1)
    with h5py.File(path, "r+") as file:
        for number, length in enumerate((7, 5, 9)):
            obs = file[f"data/demo_{number}/obs"]
            signs = np.ones((length, 1))
            signs[3:] = -1 if number == 2 else 1
            obs["robot0_eef_quat"] = smooth[:length] * signs
            obs["noise"] = np.random.default_rng(0).normal(size=(length, 4))
    notes = [note for note in inspect_dataset(path).files[0].notes if "sign" in note]
    assert len(notes) == 1
    assert notes[0].startswith("obs/robot0_eef_quat changes its sign between steps in 1 demo (demo_2)")


def test_low_dim_keys_that_never_change_are_told_dim_by_dim(tmp_path):
    path = make_dataset(tmp_path / "lift.hdf5")
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            demo["obs/robot0_eef_pos"][:, 1] = 0.5
    assert "obs/robot0_eef_pos never changes in dims 1" in inspect_dataset(path).files[0].notes


def test_two_cameras_with_the_same_frames_are_told(tmp_path):
    path = make_dataset(tmp_path / "lift.hdf5")
    assert not any("show the same frames" in note for note in inspect_dataset(path).files[0].notes)
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            demo["obs/robot0_eye_in_hand_image"][...] = demo["obs/agentview_image"][()]
    told = "cameras agentview_image and robot0_eye_in_hand_image show the same frames in 3 of 3 demos looked at"
    assert told in inspect_dataset(path).files[0].notes
