"""LeRobot folders: every row and frame, in any order of reading; what is odd is told, what is damaged is named."""

import json
import shutil
from contextlib import suppress

import numpy as np
import pytest
from lerobot_fakes import CODECS, SIZE, TOP, WRIST, decoded, make_lerobot, read_video, write_video

from cache_pipeline import isolation
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.demos.layouts import video
from cache_pipeline.demos.layouts.registry import layout_of
from cache_pipeline.demos.summary import inspect_dataset
from cache_pipeline.errors import DatasetError, MissingExtraError
from cache_pipeline.extract.matching import recorded_dataset, source_state
from tests.cache_fakes import equal, extract, outputs

pytest.importorskip("pyarrow", reason="needs the extra lerobot")
pytest.importorskip("av", reason="needs the extra lerobot")

ALL = [(version, images) for version in ("v2.0", "v2.1", "v3.0") for images in ("h264", "av1", "PNG", "JPEG")]
SOME = [("v2.1", "h264"), ("v3.0", "h264"), ("v3.0", "PNG")]


def expected_frames(folder, episodes, images, camera):
    """The frames of each episode: whole videos decoded from their start and cut, or images decoded by Pillow."""
    if images not in CODECS:
        return [np.stack([decoded(image, images) for image in arrays[camera]]) for arrays in episodes]
    files = sorted(path for path in (folder / "videos").rglob("*.mp4") if camera in str(path))
    whole = np.concatenate([read_video(path) for path in files])
    return np.split(whole, np.cumsum([len(arrays[camera]) for arrays in episodes])[:-1])


@pytest.mark.parametrize(("version", "images"), ALL)
def test_every_frame_and_row_equals_what_was_written(tmp_path, version, images):
    episodes = make_lerobot(tmp_path / "set", version=version, images=images)
    with Dataset.open(tmp_path / "set", low_dim_keys=["observation.state", "observation.environment_state"]) as dataset:
        assert dataset.cameras == {TOP: SIZE, WRIST: SIZE}
        assert [demo.name for demo in dataset.demos] == ["episode_0", "episode_1", "episode_2"]
        assert [demo.task for demo in dataset.demos] == ["lift the cube", "open the drawer", "lift the cube"]
        for camera in (TOP, WRIST):
            expected = expected_frames(tmp_path / "set", episodes, images, camera)
            for number, frames in enumerate(expected):
                np.testing.assert_array_equal(dataset.frames(number, camera), frames)
        for number, arrays in enumerate(episodes):
            rows = dataset.rows(number)
            np.testing.assert_array_equal(rows["actions"], arrays["action"])
            np.testing.assert_array_equal(rows["rewards"], arrays["next.reward"])
            np.testing.assert_array_equal(rows["dones"], arrays["next.done"])
            for key in ("observation.state", "observation.environment_state"):
                np.testing.assert_array_equal(rows[f"low_dim/{key}"], arrays[key])


@pytest.mark.parametrize(("version", "images"), [*SOME, ("v3.0", "av1")])
def test_frames_in_any_order_are_those_of_reading_in_order(tmp_path, version, images):
    episodes = make_lerobot(tmp_path / "set", version=version, images=images, lengths=(50, 45, 60), episodes_per_file=3)
    expected = expected_frames(tmp_path / "set", episodes, images, TOP)
    rng = np.random.default_rng(0)
    with Dataset.open(tmp_path / "set") as dataset:
        for _ in range(5):
            drawn = rng.integers((0, 0, 0), (3, 40, 5), size=(6, 3)).tolist()
            segments = [(demo, start, start + count) for demo, start, count in drawn]
            found = dataset.gather(TOP, segments)
            np.testing.assert_array_equal(found, np.concatenate([expected[d][a:b] for d, a, b in segments]))


def test_a_video_is_decoded_once_and_without_a_seek_when_it_is_read_in_order(tmp_path, monkeypatch):
    make_lerobot(tmp_path / "set", lengths=(50, 45, 60), episodes_per_file=3)
    monkeypatch.setattr(isolation, "_in_child", True)  # the counters are in this process
    monkeypatch.setattr(isolation.signal, "setitimer", lambda *timer: None)  # which would end this process
    decoded, sought = [], []
    advance, seek = video.Video._advance, video.Video._seek
    monkeypatch.setattr(video.Video, "_advance", lambda self, time: decoded.append(1) or advance(self, time))
    monkeypatch.setattr(video.Video, "_seek", lambda self, time: sought.append(time) or seek(self, time))
    with Dataset.open(tmp_path / "set") as dataset:
        decoded.clear()
        for demo, length in enumerate((50, 45, 60)):
            for start in range(0, length, 16):
                for camera in (TOP, WRIST):
                    dataset.frames(demo, camera, start, min(start + 16, length))
    assert sought == []
    assert len(decoded) == 2 * 155


@pytest.mark.parametrize(("version", "images"), SOME)
def test_the_summary_says_layout_cameras_tasks_and_what_is_left_out(tmp_path, version, images):
    make_lerobot(tmp_path / "set", version=version, images=images)
    summary = inspect_dataset(tmp_path / "set")
    assert summary.sound
    file = summary.files[0]
    assert file.layout == f"LeRobot {version}, 10 fps, robot panda"
    assert file.cameras[TOP].compression == ("h264 video" if images == "h264" else images)
    assert file.low_dim == {"observation.environment_state": 4, "observation.state": 5}
    assert file.tasks == {"lift the cube": 2, "open the drawer": 1}
    assert file.actions.dim == 7
    with Dataset.open(tmp_path / "set") as dataset:
        assert dataset.choice.lines() == [
            f"used: cameras {TOP}, {WRIST}; low-dim keys observation.state; action key actions",
            "left out: low-dim keys observation.environment_state (choose with --low-dim-keys)",
        ]
        assert dataset.files[0].layout == "lerobot"
        assert dataset.files[0].decoder.startswith("PyAV")


def test_splits_are_filter_keys_and_val_is_held_out(tmp_path):
    make_lerobot(tmp_path / "set", splits={"train": "0:2", "val": "2:3", "odd": "x"})
    with Dataset.open(tmp_path / "set") as dataset:
        assert dataset.masks == {"train": (0, 1), "valid": (2,)}
    assert len(Dataset.open(tmp_path / "set", filter_key="train").demos) == 2


@pytest.mark.parametrize(("version", "images"), SOME)
def test_a_cache_of_a_folder_is_complete_resumes_and_says_its_origin(tmp_path, version, images):
    make_lerobot(tmp_path / "set", version=version, images=images)
    extract(tmp_path / "set.zarr", tmp_path / "set")
    cache = FeatureCache(tmp_path / "set.zarr")
    assert cache.tasks == ("lift the cube", "open the drawer", "lift the cube")
    (source,) = cache.manifest.files
    assert (source.layout, source_state(source)) == ("lerobot", "as recorded")
    with Dataset.open(tmp_path / "set") as dataset, recorded_dataset(cache.manifest) as again:
        assert equal(again.frames(1, WRIST), dataset.frames(1, WRIST))
    assert extract(tmp_path / "set.zarr", tmp_path / "set").units_encoded == 0


def test_a_changed_video_changes_the_demos_that_it_shows_and_no_others(tmp_path):
    folder, out = tmp_path / "set", tmp_path / "set.zarr"
    episodes = make_lerobot(folder, version="v2.1")
    extract(out, folder)
    before = {demo.name: demo.digests for demo in FeatureCache(out).demos}
    write_video(folder / f"videos/chunk-000/{TOP}/episode_000001.mp4", 255 - episodes[1][TOP])
    assert source_state(FeatureCache(out).manifest.files[0]) == "changed"
    extract(out, folder)
    after = {demo.name: demo.digests for demo in FeatureCache(out).demos}
    assert [name for name in before if before[name] != after[name]] == ["episode_1"]
    assert before["episode_1"][WRIST] == after["episode_1"][WRIST]


def test_a_moved_folder_is_recognised_by_its_contents(tmp_path):
    make_lerobot(tmp_path / "set")
    extract(tmp_path / "set.zarr", tmp_path / "set")
    before = outputs(tmp_path / "set.zarr")
    (tmp_path / "set").rename(tmp_path / "moved")
    assert extract(tmp_path / "set.zarr", tmp_path / "moved").units_encoded == 0
    assert outputs(tmp_path / "set.zarr")["units"] == before["units"]


def test_another_decoder_version_is_compared_by_decoded_frames(tmp_path, monkeypatch):
    make_lerobot(tmp_path / "set")
    extract(tmp_path / "set.zarr", tmp_path / "set")
    (source,) = FeatureCache(tmp_path / "set.zarr").manifest.files
    monkeypatch.setattr(layout_of(tmp_path / "set"), "decoder", lambda: "PyAV 99")
    assert source_state(source) == "changed"
    assert extract(tmp_path / "set.zarr", tmp_path / "set").units_encoded == 0


def edit_info(folder, **values):
    path = folder / "meta/info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def read_all(folder):
    with Dataset.open(folder) as dataset:
        for demo in range(len(dataset.demos)):
            dataset.rows(demo)
            for camera in dataset.cameras:
                dataset.frames(demo, camera)


def refused(folder, *parts):
    with pytest.raises(DatasetError) as error:
        read_all(folder)
    text = str(error.value)
    assert "\n" not in text
    assert all(part in text for part in parts), text
    return text


def test_another_version_and_a_folder_that_is_no_dataset_are_told(tmp_path):
    make_lerobot(tmp_path / "set", images="PNG")
    edit_info(tmp_path / "set", codebase_version="v1.6")
    refused(tmp_path / "set", "of version v1.6, but v2.0, v2.1, v3.0 are read")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "lift.hdf5").touch()
    refused(tmp_path / "folder", "is a folder without meta/info.json", "lift.hdf5")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data_path": "../{file_index}.parquet"}, "leads out of the dataset"),
        ({"video_path": "/etc/{video_key}"}, "leads out of the dataset"),
        ({"fps": 0}, "it must be positive"),
        ({"features": {}}, "holds no cameras"),
        ({"features": 3}, "its folder meta cannot be read"),
    ],
)
def test_an_info_file_that_cannot_be_used_is_named(tmp_path, change, said):
    make_lerobot(tmp_path / "set")
    edit_info(tmp_path / "set", **change)
    refused(tmp_path / "set", said)


@pytest.mark.parametrize(("version", "images"), SOME)
def test_missing_files_are_named(tmp_path, version, images):
    make_lerobot(tmp_path / "set", version=version, images=images)
    last = sorted((tmp_path / "set" / ("videos" if images == "h264" else "data")).rglob("*.*"))[-1]
    last.unlink()
    refused(tmp_path / "set", last.name)
    assert not inspect_dataset(tmp_path / "set").sound


def test_a_damaged_video_names_episode_camera_and_frames(tmp_path):
    make_lerobot(tmp_path / "set", version="v2.1", lengths=(40, 40))
    path = tmp_path / f"set/videos/chunk-000/{TOP}/episode_000001.mp4"
    data = bytearray(path.read_bytes())
    at = data.index(b"mdat") + 4
    data[at : at + 400] = bytes(400)
    path.write_bytes(data)
    refused(tmp_path / "set", str(path), f"episode_1: '{TOP}' between frames 0 and 40")


def test_a_video_that_is_shorter_than_its_episode_is_unsound(tmp_path):
    episodes = make_lerobot(tmp_path / "set", version="v2.1")
    write_video(tmp_path / f"set/videos/chunk-000/{TOP}/episode_000002.mp4", episodes[2][TOP][:6])
    refused(tmp_path / "set", f"obs/{TOP}", "episode_000002.mp4 has 6 frames for 9 steps")
    assert not inspect_dataset(tmp_path / "set").sound


def test_lengths_that_differ_from_the_rows_are_unsound(tmp_path):
    make_lerobot(tmp_path / "set", version="v2.1", images="PNG")
    path = tmp_path / "set/meta/episodes.jsonl"
    path.write_text(path.read_text().replace('"length": 5', '"length": 6'))
    refused(tmp_path / "set", "episode_000001.parquet", "the file has 5 of its 6 rows")
    assert not inspect_dataset(tmp_path / "set").sound


def test_dropped_frames_are_told(tmp_path):
    make_lerobot(tmp_path / "set", images="PNG", times={1: [0, 0.1, 0.4, 0.5, 0.6]})
    summary = inspect_dataset(tmp_path / "set")
    assert summary.sound
    (note,) = (note for note in summary.files[0].notes if "timestamps" in note)
    assert "1 demos are not 0.1 s apart" in note
    assert "episode_1 0.3 s between frames 1 and 2" in note


def test_a_timestamp_without_a_frame_in_the_video_is_named(tmp_path):
    make_lerobot(tmp_path / "set", version="v2.1", times={1: [0, 0.1, 0.25, 0.3, 0.4]})
    refused(tmp_path / "set", "episode_1", "it has no frame at 0.2500 s; the next one is at 0.3000 s")


def test_episodes_without_steps_are_skipped_and_named(tmp_path):
    make_lerobot(tmp_path / "set", version="v2.1", images="PNG")
    with (tmp_path / "set/meta/episodes.jsonl").open("a") as file:
        file.write(json.dumps({"episode_index": 3, "tasks": [], "length": 0}) + "\n")
    with Dataset.open(tmp_path / "set") as dataset:
        assert len(dataset.demos) == 3
    assert "1 of 4 demos have no steps and are skipped (episode_3)" in inspect_dataset(tmp_path / "set").files[0].notes


def test_videos_of_depth_are_left_out(tmp_path):
    make_lerobot(tmp_path / "set")
    info = json.loads((tmp_path / "set/meta/info.json").read_text())
    info["features"][WRIST]["info"] = {"video.is_depth_map": True}
    edit_info(tmp_path / "set", features=info["features"])
    with Dataset.open(tmp_path / "set") as dataset:
        assert list(dataset.cameras) == [TOP]
        assert dataset.choice.other_obs == (WRIST,)
    assert f"videos of depth are left out: {WRIST}" in inspect_dataset(tmp_path / "set").files[0].notes


def test_a_folder_that_changes_while_it_is_open_is_told(tmp_path):
    make_lerobot(tmp_path / "set")
    with Dataset.open(tmp_path / "set") as dataset:
        shutil.copy(tmp_path / "set/meta/info.json", tmp_path / "set/meta/copy.json")
        with pytest.raises(DatasetError, match="has changed since it was opened"):
            dataset.frames(0, TOP)


@pytest.mark.parametrize("package", ["pyarrow", "av"])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, package):
    make_lerobot(tmp_path / "set")
    (tmp_path / "none" / package).mkdir(parents=True)
    (tmp_path / "none" / package / "__init__.py").write_text("raise ImportError('none here')")
    monkeypatch.syspath_prepend(tmp_path / "none")
    isolation.end_child()
    try:
        with pytest.raises(MissingExtraError, match="uv sync --extra lerobot"):
            Dataset.open(tmp_path / "set")
    finally:
        isolation.end_child()


@pytest.mark.parametrize(("version", "images"), SOME)
def test_damaged_bytes_of_any_file_give_an_error_or_a_sound_result(tmp_path, version, images):
    make_lerobot(tmp_path / "base", version=version, images=images, lengths=(4, 3))
    rng = np.random.default_rng(0)
    files = sorted(path for path in (tmp_path / "base").rglob("*") if path.is_file())
    for number in range(40):
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        shutil.copytree(tmp_path / "base", tmp_path / "set")
        path = tmp_path / "set" / files[number % len(files)].relative_to(tmp_path / "base")
        stored = bytearray(path.read_bytes())
        stored[rng.integers(len(stored))] ^= int(rng.integers(1, 256))
        path.write_bytes(stored[: rng.integers(len(stored))] if number % 5 == 4 else stored)
        with suppress(DatasetError):
            read_all(tmp_path / "set")
        with suppress(DatasetError):
            json.dumps(inspect_dataset(tmp_path / "set").to_json(), allow_nan=False)
