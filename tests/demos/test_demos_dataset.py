"""``Dataset`` on sound files, in any process and thread."""

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import h5py
import numpy as np
import pytest
from fakes import make_dataset

from cache_pipeline.demos.dataset import Dataset, Demo
from cache_pipeline.demos.layouts.protocol import demo_order
from cache_pipeline.errors import DatasetError

CAMERA, EYE = "agentview_image", "robot0_eye_in_hand_image"


def stored(path, key):
    with h5py.File(path) as file:
        return file[key][()]


def test_demos_are_in_numeric_order_with_gaps(tmp_path):
    path = make_dataset(tmp_path / "gaps.hdf5", names=["demo_10", "demo_2", "demo_103"])
    assert Dataset.open(path).demos == (Demo(0, "demo_2", 5), Demo(0, "demo_10", 7), Demo(0, "demo_103", 9))


def test_demo_names_of_any_form_are_sortable():
    names = ["demo_2", "demo_10", "demo_²", "a", "7", "demo_02", "demo"]
    assert sorted(names, key=demo_order) == ["7", "a", "demo", "demo_02", "demo_2", "demo_10", "demo_²"]


def test_cameras_are_found_by_type_and_shape_and_may_differ_in_size(tmp_path):
    path = make_dataset(tmp_path / "lift.hdf5", cameras={"front": (24, 32, 3), "wrist_rgb": (16, 16, 3)})
    with h5py.File(path, "r+") as file:
        for name, demo in file["data"].items():
            length = len(demo["actions"])
            file[f"data/{name}/obs/front_depth"] = np.zeros((length, 24, 32, 1), np.float32)
            file[f"data/{name}/obs/masks"] = np.zeros((length, 24, 32, 1), np.uint8)
    assert Dataset.open(path).cameras == {"front": (24, 32, 3), "wrist_rgb": (16, 16, 3)}


def test_cameras_and_keys_keep_the_requested_order(tmp_path):
    dataset = Dataset.open(
        make_dataset(tmp_path / "lift.hdf5"), cameras=[EYE, CAMERA], low_dim_keys=["object", "robot0_eef_pos"]
    )
    assert list(dataset.cameras) == [EYE, CAMERA]
    assert dataset.low_dim == {"object": (4,), "robot0_eef_pos": (3,)}


@pytest.mark.parametrize(
    ("there", "cameras", "expected"),
    [
        (
            ("robot0_gripper_qpos", "robot0_joint_pos", "robot0_eef_pos", "object"),
            None,
            "robot0_eef_pos robot0_gripper_qpos",
        ),
        (("robot0_eef_pos", "object"), (), "robot0_eef_pos object"),
        (("joints", "object", "force"), None, "force joints"),
        (("joints", "object"), (), "joints object"),
        (("object",), None, ""),
        (
            ("robot1_eef_pos", "robot0_gripper_qpos", "robot0_eef_pos", "robot1_joint_pos", "robot1_gripper_qpos"),
            None,
            "robot0_eef_pos robot0_gripper_qpos robot1_eef_pos robot1_gripper_qpos",
        ),
        (
            ("robot0_right_eef_pos", "robot0_left_eef_quat", "robot0_left_gripper_qpos", "robot0_left_joint_pos"),
            None,
            "robot0_left_eef_quat robot0_left_gripper_qpos robot0_right_eef_pos",
        ),
        (("right_eef_pos", "left_eef_pos", "object"), (), "left_eef_pos right_eef_pos object"),
        (("eef_pos", "gripper_pos", "cube_positions"), None, "eef_pos gripper_pos"),
        (("robot10_eef_pos", "robot2_eef_pos", "robot2_eef_pos_rel"), None, "robot2_eef_pos robot10_eef_pos"),
    ],
)
def test_default_low_dim_keys_are_proprioception_and_object_only_without_cameras(tmp_path, there, cameras, expected):
    path = make_dataset(tmp_path / "lift.hdf5", low_dim=dict.fromkeys(there, 2))
    assert list(Dataset.open(path, cameras=cameras).low_dim) == expected.split()


@pytest.mark.parametrize("compression", ["gzip", "lzf", None])
def test_frames_equal_the_stored_frames(tmp_path, compression):
    path = make_dataset(tmp_path / "lift.hdf5", compression=compression)
    dataset = Dataset.open(path)
    for number, demo in enumerate(dataset.demos):
        for camera in dataset.cameras:
            expected = stored(path, f"data/{demo.name}/obs/{camera}")
            np.testing.assert_array_equal(dataset.frames(number, camera), expected)
            np.testing.assert_array_equal(dataset.frames(number, camera, 3, 5), expected[3:5])


@pytest.mark.parametrize("compression", ["gzip", None])
def test_gathered_segments_are_concatenated(tmp_path, compression):
    dataset = Dataset.open(make_dataset(tmp_path / "lift.hdf5", compression=compression))
    segments = [(2, 1, 9), (0, 3, 3), (1, 0, 5), (2, 0, 2)]
    expected = np.concatenate([dataset.frames(demo, EYE, start, stop) for demo, start, stop in segments])
    np.testing.assert_array_equal(dataset.gather(EYE, segments), expected)
    assert dataset.gather(EYE, []).shape == (0, 24, 24, 3)


def test_frames_outside_the_demo_raise_an_index_error_and_an_unknown_camera_a_dataset_error(tmp_path):
    dataset = Dataset.open(make_dataset(tmp_path / "lift.hdf5"), cameras=[CAMERA])
    for start, stop in ((0, 8), (-1, 2), (3, 2)):
        with pytest.raises(IndexError):
            dataset.frames(0, CAMERA, start, stop)
    with pytest.raises(DatasetError, match=f"available: {CAMERA}"):
        dataset.frames(0, EYE)


def test_rows_equal_the_stored_values_as_float32(tmp_path):
    path = make_dataset(tmp_path / "lift.hdf5")
    rows = Dataset.open(path).rows(1)
    assert {name: (values.shape, values.dtype) for name, values in rows.items()} == {
        "actions": ((5, 7), np.float32),
        "rewards": ((5,), np.float32),
        "dones": ((5,), np.float32),
        "low_dim/robot0_eef_pos": ((5, 3), np.float32),
        "low_dim/robot0_gripper_qpos": ((5, 2), np.float32),
    }
    np.testing.assert_array_equal(rows["actions"], stored(path, "data/demo_1/actions").astype(np.float32))
    np.testing.assert_array_equal(rows["dones"], [0, 0, 0, 0, 1])


def test_a_number_per_step_is_read_as_a_row_of_width_one(tmp_path):
    path = make_dataset(tmp_path / "lift.hdf5")
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            demo["obs/phase"] = np.arange(len(demo["actions"]))
    dataset = Dataset.open(path, low_dim_keys=["phase"])
    assert dataset.low_dim == {"phase": (1,)}
    assert dataset.rows(1)["low_dim/phase"].tolist() == [[0], [1], [2], [3], [4]]


@pytest.mark.parametrize("shape", [(1, 4), (4, 4), (2, 3, 2), (1,), (7, 1)])
def test_low_dim_arrays_of_any_shape_per_step_are_flattened_to_rows(tmp_path, shape):
    path, width = make_dataset(tmp_path / "lift.hdf5"), int(np.prod(shape))
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            demo["obs/pose"] = np.arange(len(demo["actions"]) * width).reshape(-1, *shape)
    dataset = Dataset.open(path, low_dim_keys=["pose"])
    assert dataset.low_dim == {"pose": (width,)}
    assert np.array_equal(dataset.rows(1)["low_dim/pose"], stored(path, "data/demo_1/obs/pose").reshape(5, width))
    assert "pose" in Dataset.open(path).choice.other_low_dim


def test_depth_is_low_dim_only_when_it_is_named(tmp_path):
    path = make_dataset(tmp_path / "lift.hdf5", low_dim={})
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            demo["obs/depth"] = np.ones((len(demo["actions"]), 24, 24, 1), np.float32)
            demo["obs/far"] = np.ones((len(demo["actions"]), 24, 24), np.float32)
    dataset = Dataset.open(path)
    assert (dataset.low_dim, dataset.choice.other_obs) == ({}, ("depth", "far"))
    assert Dataset.open(path, low_dim_keys=["depth"]).low_dim == {"depth": (576,)}


def test_used_and_left_out_keys_are_listed_in_two_lines(tmp_path):
    path = make_dataset(tmp_path / "lift.hdf5")
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            demo["actions_abs"] = demo["actions"][()]
            demo["action_dict/abs_pos"] = demo["actions"][()]
    assert Dataset.open(path, cameras=[CAMERA]).choice.lines() == [
        f"used: cameras {CAMERA}; low-dim keys robot0_eef_pos, robot0_gripper_qpos; action key actions",
        f"left out: cameras {EYE}; low-dim keys object; action keys action_dict/abs_pos, "
        "actions_abs (choose with --cameras, --low-dim-keys, --action-key)",
    ]


def test_missing_rewards_are_nan_not_zeros(tmp_path):
    path = make_dataset(tmp_path / "lift.hdf5")
    with h5py.File(path, "r+") as file:
        del file["data/demo_1/rewards"]
    dataset = Dataset.open(path)
    assert np.isnan(dataset.rows(1)["rewards"]).all()
    assert dataset.rows(1)["rewards"].shape == (5,)
    assert np.isfinite(dataset.rows(0)["rewards"]).all()


def test_a_filter_key_selects_demos_and_masks_list_only_selected_demos(tmp_path):
    masks = {"train": ["demo_0", "demo_1"], "valid": ["demo_2"], "gone": ["demo_1", "demo_7"], "none": []}
    path = make_dataset(tmp_path / "lift.hdf5", masks=masks)
    assert Dataset.open(path).masks == {"train": (0, 1), "valid": (2,), "gone": (1,)}
    assert Dataset.open(path).absent == {"gone": ("demo_7",)}
    dataset = Dataset.open(path, filter_key="valid")
    assert [demo.name for demo in dataset.demos] == ["demo_2"]
    assert dataset.masks == {"valid": (0,)}
    assert dataset.absent == {"train": ("demo_0", "demo_1"), "gone": ("demo_1", "demo_7")}


def test_a_file_without_env_args_and_total_opens(tmp_path):
    path = make_dataset(tmp_path / "bare.hdf5", env_args=None, total=False)
    dataset = Dataset.open(path)
    assert dataset.env_args is None
    assert dataset.render_flags is None


def test_env_args_and_render_flags_are_read(tmp_path):
    path = make_dataset(tmp_path / "lift.hdf5", render_flags={"shadow": False})
    dataset = Dataset.open(path)
    assert dataset.env_args["env_name"] == "Lift"
    assert dataset.render_flags == {"shadow": False}


def test_several_files_are_one_list_of_demos_file_by_file(tmp_path):
    first = make_dataset(tmp_path / "a.hdf5", lengths=(4, 3))
    second = make_dataset(
        tmp_path / "b.hdf5", lengths=(6,), seed=1, masks={"train": ["demo_0"]}, env_args={"env_name": "Can"}
    )
    dataset = Dataset.open([first, second])
    assert dataset.demos == (Demo(0, "demo_0", 4), Demo(0, "demo_1", 3), Demo(1, "demo_0", 6))
    assert dataset.steps == 13
    assert dataset.masks == {"train": (0, 2), "valid": (1,)}
    assert dataset.env_args is None
    np.testing.assert_array_equal(dataset.frames(2, CAMERA), stored(second, f"data/demo_0/obs/{CAMERA}"))


def test_the_number_of_actions_overrides_a_wrong_num_samples(tmp_path):
    path = make_dataset(tmp_path / "lift.hdf5")
    with h5py.File(path, "r+") as file:
        file["data/demo_0"].attrs["num_samples"] = 99
        del file["data/demo_1"].attrs["num_samples"]
    assert [demo.length for demo in Dataset.open(path).demos] == [7, 5, 9]


def test_a_dataset_pickles_without_its_handles_after_it_was_read(tmp_path):
    dataset = Dataset.open(make_dataset(tmp_path / "lift.hdf5"))
    frames = dataset.frames(0, CAMERA)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.demos == dataset.demos
    np.testing.assert_array_equal(copy.frames(0, CAMERA), frames)


def read_all(dataset):
    return [int(dataset.frames(i, CAMERA).sum()) for i in range(len(dataset.demos))]


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_dataset_gives_the_same_frames_in_child_processes_after_reading(tmp_path, method):
    dataset = Dataset.open(make_dataset(tmp_path / "lift.hdf5"))
    expected = read_all(dataset)
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
        assert list(pool.map(read_all, [dataset] * 3)) == [expected] * 3
    assert read_all(dataset) == expected


def test_a_forked_child_uses_the_inherited_dataset_and_leaves_the_parents_alone(tmp_path):
    dataset = Dataset.open(make_dataset(tmp_path / "lift.hdf5"))
    expected = read_all(dataset)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(read_all(dataset)))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert queue.get() == expected
    assert read_all(dataset) == expected


def test_threads_read_what_one_thread_reads(tmp_path):
    dataset = Dataset.open(make_dataset(tmp_path / "lift.hdf5", lengths=(20,) * 8))
    expected = read_all(dataset)
    dataset.close()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: read_all(dataset), range(8))) == [expected] * 8


def test_a_relative_path_still_reads_after_the_folder_changes(tmp_path, monkeypatch):
    make_dataset(tmp_path / "lift.hdf5")
    monkeypatch.chdir(tmp_path)
    dataset = Dataset.open("lift.hdf5")
    monkeypatch.chdir("/")
    assert len(dataset.frames(0, CAMERA)) == 7


def test_a_closed_dataset_opens_again_when_it_is_read(tmp_path):
    dataset = Dataset.open(make_dataset(tmp_path / "lift.hdf5"))
    expected = read_all(dataset)
    dataset.close()
    assert read_all(dataset) == expected
