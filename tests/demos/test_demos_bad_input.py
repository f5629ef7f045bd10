"""Unsound files give a one-line error with file, demo, key and frame, and problems in inspect."""

import json
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pytest
from fakes import make_dataset

from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.demos.summary import inspect_dataset
from cache_pipeline.errors import DatasetError
from cache_pipeline.hdf5 import open_file

CAMERA, EYE, EEF = "agentview_image", "robot0_eye_in_hand_image", "robot0_eef_pos"


@pytest.fixture
def path(tmp_path):
    return make_dataset(tmp_path / "lift.hdf5")


def change(path: Path, key: str, values=None, **options) -> None:
    """Replaces one array of a file, or removes it."""
    with h5py.File(path, "r+") as file:
        del file[key]
        if values is not None:
            file.create_dataset(key, data=values, **options)


def refused(path, *words: str, **options) -> None:
    with pytest.raises(DatasetError) as caught:
        Dataset.open(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in (*words, "" if isinstance(path, list) else str(path)):
        assert word in message, message


def unsound(path, *words: str) -> None:
    """Refused by open, and listed as a problem by inspect."""
    refused(path, *words)
    summary = inspect_dataset(path)
    assert not summary.sound
    assert any(all(word in problem for word in words) for problem in summary.files[0].problems), summary.files[
        0
    ].problems


def test_a_missing_file_is_an_error_that_lists_the_files_beside_it(path, tmp_path):
    refused(tmp_path / "lfit.hdf5", "no file", "lift.hdf5")
    refused(tmp_path / "nowhere" / "lift.hdf5", "no file")


def test_a_folder_is_refused(tmp_path):
    refused(tmp_path, "is a folder")


def test_naming_no_file_or_one_twice_is_an_error(path):
    refused([], "no dataset is given")
    refused([path, path.parent / "." / path.name], "named twice")


def test_a_text_file_is_reported_as_not_hdf5(tmp_path):
    (tmp_path / "notes.hdf5").write_text("not an hdf5 file at all")
    refused(tmp_path / "notes.hdf5", "is not an HDF5 file")


def test_an_empty_file_is_reported_as_not_hdf5(tmp_path):
    (tmp_path / "empty.hdf5").write_bytes(b"")
    refused(tmp_path / "empty.hdf5", "is not an HDF5 file")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_reported_as_cut_off(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refused(path, "is cut off", f"of {len(whole)}")


def test_a_damaged_header_raises_a_dataset_error(path):
    stored = bytearray(path.read_bytes())
    stored[60:200] = b"\xff" * 140
    path.write_bytes(stored)
    with pytest.raises(DatasetError):
        Dataset.open(path)


def test_a_file_that_another_process_writes_is_reported_as_such(path):
    writer = textwrap.dedent(f"""
        import h5py
        with h5py.File({str(path)!r}, "r+"):
            print("open", flush=True)
            input()
    """)
    with subprocess.Popen(
        [sys.executable, "-c", writer], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "open\n"
        refused(path, "being written by another process")
        process.communicate("\n")


def test_a_file_system_without_locks_is_reported_with_the_setting_that_helps(path, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Unable to synchronously open file (unable to lock file, errno = 38)")

    monkeypatch.setattr(h5py, "File", no_locks)
    with pytest.raises(DatasetError, match=r"cannot be locked.*HDF5_USE_FILE_LOCKING=FALSE"):
        open_file(path)


def test_a_file_without_a_data_group_is_refused(path):
    change(path, "data")
    refused(path, "no group 'data'", "mask")


def test_a_file_without_demos_is_refused(path):
    change(path, "data")
    with h5py.File(path, "r+") as file:
        file.create_group("data")
    refused(path, "holds no demos")


def test_an_array_among_the_demos_is_unsound(path):
    with h5py.File(path, "r+") as file:
        file["data/demo_9"] = np.zeros(3)
    unsound(path, "data/demo_9 is not a group")


def test_a_broken_link_is_unsound(path):
    with h5py.File(path, "r+") as file:
        file["data/demo_1/obs/extra"] = h5py.SoftLink("/data/nowhere")
    unsound(path, "demo_1", "obs/extra cannot be read")


def test_a_file_without_cameras_opens_only_if_no_cameras_are_requested(tmp_path):
    path = make_dataset(tmp_path / "low_dim.hdf5", cameras={})
    refused(path, "holds no cameras", "robot0_eef_pos")
    assert Dataset.open(path, cameras=()).cameras == {}


def test_a_wrong_camera_lists_the_right_ones(path):
    refused(path, "no camera 'agentview'", CAMERA, EYE, "did you mean agentview_image", cameras=["agentview"])


def test_a_low_dim_key_named_as_a_camera_is_an_error_with_its_shape(path):
    refused(path, "demo_0", "obs/robot0_eef_pos is float64 (7, 3)", "uint8 (T, H, W, 3)", cameras=[EEF])


def test_a_camera_named_as_a_low_dim_key_is_an_error_with_its_shape(path):
    refused(path, "demo_0", "obs/agentview_image is uint8 (7, 24, 24, 3)", low_dim_keys=[CAMERA])


def test_a_wrong_low_dim_key_lists_the_right_ones(path):
    refused(path, "no low-dim key 'eef_pos'", EEF, "robot0_gripper_qpos", low_dim_keys=["eef_pos"])


def test_a_wrong_filter_key_lists_the_right_ones(path):
    refused(path, "no filter key 'trian'", "train, valid", "did you mean train", filter_key="trian")


def test_a_filter_key_that_names_absent_demos_uses_the_others_with_a_warning(tmp_path, caplog):
    masks = {"train": ["demo_0", "demo_2", *(f"demo_{i}" for i in range(10, 20))], "gone": ["demo_77"]}
    path = make_dataset(tmp_path / "part.hdf5", masks=masks)
    dataset = Dataset.open(path, filter_key="train")
    assert [demo.name for demo in dataset.demos] == ["demo_0", "demo_2"]
    assert "'train' names 10 demos that are not in the data (demo_10, demo_11" in caplog.text
    assert "the other 2 of 12 are used" in caplog.text
    refused(path, "'gone'", "names 1 demos, and none of them is in the file", filter_key="gone")


def test_a_filter_key_without_demos_is_refused(tmp_path):
    path = make_dataset(tmp_path / "empty_key.hdf5", masks={"train": [], "all": ["demo_0"]})
    refused(path, "'train'", "names no demos", filter_key="train")


def test_frames_that_are_fewer_than_the_actions_are_unsound(path):
    change(path, f"data/demo_1/obs/{CAMERA}", np.zeros((4, 24, 24, 3), np.uint8))
    unsound(path, "demo_1", f"obs/{CAMERA} has 4 frames", "5 actions")


def test_low_dim_obs_that_are_more_than_the_actions_are_unsound(path):
    change(path, f"data/demo_1/obs/{EEF}", np.zeros((6, 3)))
    unsound(path, "demo_1", f"obs/{EEF} has 6 frames", "5 actions")


def test_rewards_of_another_length_are_unsound(path):
    change(path, "data/demo_1/rewards", np.zeros(6))
    unsound(path, "demo_1", "rewards is float64 (6)", "5 actions")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_actions_that_are_not_finite_are_unsound_and_named_by_frame(path, value):
    with h5py.File(path, "r+") as file:
        file["data/demo_2/actions"][6, 3] = value
    unsound(path, "demo_2", "actions is", "at frame 6", "1 of 9 frames")


def test_low_dim_obs_that_are_not_finite_are_unsound_and_named_by_frame(path):
    with h5py.File(path, "r+") as file:
        file[f"data/demo_1/obs/{EEF}"][2:, 0] = np.nan
    unsound(path, "demo_1", f"obs/{EEF} is nan at frame 2", "3 of 5 frames")


def test_rewards_that_are_not_finite_are_unsound(path):
    with h5py.File(path, "r+") as file:
        file["data/demo_0/rewards"][1] = np.nan
    unsound(path, "demo_0", "rewards is nan at frame 1")


def test_nan_in_an_unused_key_is_a_note_and_an_error_if_the_key_is_named(path):
    with h5py.File(path, "r+") as file:
        file["data/demo_1/obs/object"][2, 0] = np.nan
    Dataset.open(path)
    summary = inspect_dataset(path)
    assert summary.sound
    assert any("if asked for: demo_1: obs/object is nan at frame 2" in note for note in summary.files[0].notes)
    refused(path, "obs/object is nan at frame 2", low_dim_keys=["object"])


def test_nan_in_a_demo_that_the_filter_key_leaves_out_does_not_matter(path):
    with h5py.File(path, "r+") as file:
        file["data/demo_2/actions"][0, 0] = np.nan
    assert len(Dataset.open(path, filter_key="train").demos) == 2


def test_float_images_are_left_out_with_a_note_beside_a_camera_and_unsound_if_named_or_alone(path):
    for number, length in enumerate((7, 5, 9)):
        change(path, f"data/demo_{number}/obs/{EYE}", np.zeros((length, 24, 24, 3), np.float32))
    dataset = Dataset.open(path)
    assert (list(dataset.cameras), dataset.choice.other_obs) == ([CAMERA], (EYE,))
    summary = inspect_dataset(path)
    assert summary.sound
    assert any(f"{EYE} float32 (7, 24, 24, 3)" in note for note in summary.files[0].notes)
    refused(path, f"obs/{EYE} is float32", "store images as uint8", cameras=[EYE])
    for number in range(3):
        change(path, f"data/demo_{number}/obs/{CAMERA}")
    unsound(path, "demo_0", f"obs/{EYE} is float32 (7, 24, 24, 3)", "store images as uint8")


def test_a_camera_that_one_demo_lacks_is_unsound(path):
    change(path, f"data/demo_0/obs/{EYE}")
    unsound(path, "demo_0 lacks the camera", EYE)


def test_a_low_dim_key_that_one_demo_lacks_is_unsound(path):
    change(path, f"data/demo_2/obs/{EEF}")
    unsound(path, "demo_2 lacks the low-dim key", EEF)


def test_a_demo_without_obs_is_unsound(path):
    change(path, "data/demo_1/obs")
    unsound(path, "demo_1 lacks the camera", CAMERA)


def test_a_demo_without_actions_is_unsound(path):
    change(path, "data/demo_1/actions")
    unsound(path, "demo_1 has no actions")


@pytest.mark.parametrize("values", [np.zeros(5), np.zeros((5, 0)), np.zeros((5, 7, 1)), np.zeros((5, 7), "S3")])
def test_actions_that_are_not_rows_of_numbers_are_unsound(path, values):
    change(path, "data/demo_1/actions", values)
    unsound(path, "demo_1: actions is", "numbers (T, action dim)")


def test_demos_without_steps_are_skipped_with_a_warning_that_names_them(tmp_path, caplog):
    path = make_dataset(tmp_path / "empty.hdf5", lengths=(4, 0, 5, 3), masks={"train": ["demo_0", "demo_1", "demo_2"]})
    with h5py.File(path, "r+") as file:
        del file["data/demo_2"]
        file.create_group("data/demo_2").attrs["num_samples"] = 0
    dataset = Dataset.open(path)
    assert [demo.name for demo in dataset.demos] == ["demo_0", "demo_3"]
    assert dataset.masks == {"train": (0,)}
    told = "2 of 4 demos have no steps and are skipped (demo_1, demo_2)"
    assert [record.levelname for record in caplog.records if told in record.message] == ["WARNING"]
    assert any(told in note for note in inspect_dataset(path).files[0].notes)
    assert [demo.name for demo in Dataset.open(path, filter_key="train").demos] == ["demo_0"]


def test_a_demo_without_actions_whose_obs_have_steps_is_damaged_and_not_empty(path):
    change(path, "data/demo_1/actions", np.zeros((0, 7)))
    unsound(path, "demo_1 has no steps: its actions have length 0")


def test_a_file_whose_demos_are_all_empty_is_refused(tmp_path):
    refused(make_dataset(tmp_path / "empty.hdf5", lengths=(0, 0)), "all of its 2 demos are empty")


def test_images_of_two_sizes_under_one_camera_are_unsound(path):
    change(path, f"data/demo_1/obs/{CAMERA}", np.zeros((5, 32, 24, 3), np.uint8))
    unsound(path, "demo_1", CAMERA, "(32, 24, 3)", "(24, 24, 3) in demo_0")


def test_actions_of_two_widths_are_unsound(path):
    change(path, "data/demo_2/actions", np.zeros((9, 6)))
    unsound(path, "demo_2: actions is (6,) per step", "(7,) in demo_0")


def test_low_dim_obs_of_two_widths_are_unsound(path):
    change(path, f"data/demo_2/obs/{EEF}", np.zeros((9, 4)))
    unsound(path, "demo_2", EEF, "(4,) per step", "(3,) in demo_0")


def test_frames_that_were_never_written_are_unsound(path):
    with h5py.File(path, "r+") as file:
        del file[f"data/demo_1/obs/{CAMERA}"]
        images = file.create_dataset(
            f"data/demo_1/obs/{CAMERA}", (5, 24, 24, 3), np.uint8, chunks=(2, 24, 24, 3), compression="gzip"
        )
        images[:4] = 1
    unsound(path, "demo_1", CAMERA, "is incomplete")


def test_contiguous_frames_that_were_never_written_are_unsound(path):
    with h5py.File(path, "r+") as file:
        del file[f"data/demo_1/obs/{CAMERA}"]
        file.create_dataset(f"data/demo_1/obs/{CAMERA}", (5, 24, 24, 3), np.uint8)
    unsound(path, "demo_1", CAMERA, "is incomplete")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"cameras": {CAMERA: (24, 24, 3)}}, ("lacks the camera", EYE)),
        ({"cameras": {CAMERA: (16, 24, 3), EYE: (24, 24, 3)}}, (CAMERA, "(16, 24, 3)", "(24, 24, 3)", "several files")),
        ({"action_dim": 6}, ("actions is (6,)", "(7,)", "several files")),
        ({"low_dim": {"robot0_gripper_qpos": 2}}, ("lacks the low-dim key", EEF)),
    ],
)
def test_files_with_different_cameras_keys_or_action_dims_are_refused_with_the_difference(path, tmp_path, other, words):
    second = make_dataset(tmp_path / "second.hdf5", **other)
    refused([path, second], str(second), *words)
    assert not inspect_dataset([path, second]).sound


def test_a_filter_key_that_one_of_two_files_lacks_is_refused(path, tmp_path):
    second = make_dataset(tmp_path / "second.hdf5", masks={})
    refused([path, second], "second.hdf5 has no filter key 'train'", filter_key="train")


def test_a_damaged_chunk_is_named_by_file_demo_camera_and_frames(path):
    with h5py.File(path) as file:
        chunk = file[f"data/demo_2/obs/{CAMERA}"].id.get_chunk_info(1)
    stored = bytearray(path.read_bytes())
    stored[chunk.byte_offset : chunk.byte_offset + 20] = bytes(20)
    path.write_bytes(stored)
    dataset = Dataset.open(path)
    assert dataset.frames(2, CAMERA, 0, 4).shape == (4, 24, 24, 3)
    with pytest.raises(DatasetError, match=rf"lift.hdf5 is damaged: demo_2: '{CAMERA}' between frames 0 and 9"):
        dataset.frames(2, CAMERA)


def test_a_file_that_changes_after_opening_raises_a_dataset_error(path):
    dataset = Dataset.open(path)
    make_dataset(path, lengths=(7, 5, 8))
    with pytest.raises(DatasetError, match="changed since it was opened"):
        dataset.frames(0, CAMERA)


def test_a_file_that_disappears_after_opening_raises_a_dataset_error(path):
    dataset = Dataset.open(path)
    path.unlink()
    with pytest.raises(DatasetError, match="there is no file"):
        dataset.rows(0)


def test_inspect_reports_all_problems_at_once(path):
    change(path, f"data/demo_0/obs/{EYE}")
    change(path, f"data/demo_1/obs/{EEF}", np.zeros((6, 3)))
    with h5py.File(path, "r+") as file:
        file["data/demo_2/actions"][4] = np.nan
    problems = inspect_dataset(path).files[0].problems
    assert len(problems) == 3
    assert {problem[:6] for problem in problems} == {"demo_0", "demo_1", "demo_2"}


def test_a_file_with_any_damaged_byte_gives_a_dataset_error_or_an_array(tmp_path):
    # No env_args: HDF5 itself can crash on the damaged heap of a variable-length attribute.
    path = make_dataset(tmp_path / "fuzzed.hdf5", lengths=(4, 3), cameras={CAMERA: (8, 8, 3)}, env_args=None)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(120):
        stored = bytearray(whole)
        stored[rng.integers(len(whole))] ^= int(rng.integers(1, 256))
        path.write_bytes(stored)
        with suppress(DatasetError), Dataset.open(path) as dataset:
            for demo in range(len(dataset.demos)):
                dataset.frames(demo, CAMERA)
                dataset.rows(demo)
        with suppress(DatasetError):
            json.dumps(inspect_dataset(path).to_json(), allow_nan=False)
