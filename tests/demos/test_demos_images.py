"""Frames of every form are read as rgb; the right values come from the written arrays and from Pillow."""

import io

import h5py
import numpy as np
import pytest
from PIL import Image

from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.demos.summary import inspect_dataset
from cache_pipeline.errors import DatasetError
from tests.fakes import make_dataset

LENGTHS = (7, 5, 9)
CAMERA = "agentview_image"


def replace_images(path, camera, write):
    """Replaces a camera of every demo by what ``write(group, name, images)`` stores, and returns the images."""
    written = []
    with h5py.File(path, "r+") as file:
        for number in range(len(LENGTHS)):
            obs = file[f"data/demo_{number}/obs"]
            images = obs[CAMERA][()]
            del obs[camera]
            write(obs, camera, images)
            written.append(images)
    return written


def check(path, camera, expected, **options):
    with Dataset.open(path, **options) as dataset:
        assert dataset.cameras[camera] == (24, 24, 3)
        for number, images in enumerate(expected):
            np.testing.assert_array_equal(dataset.frames(number, camera), images)
            np.testing.assert_array_equal(dataset.frames(number, camera, 2, 4), images[2:4])


def encode(image, kind, **options):
    data = io.BytesIO()
    Image.fromarray(image).save(data, kind, **options)
    return data.getvalue()


def decoded(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.fixture
def path(tmp_path):
    return make_dataset(tmp_path / "lift.hdf5", lengths=LENGTHS)


@pytest.mark.parametrize("chunks", [None, (2, 3, 24, 24), (3, 2, 7, 5)])
def test_channels_first_frames_are_read_with_channels_last(path, chunks):
    def write(obs, name, images):
        options = {} if chunks is None else {"chunks": chunks, "compression": "gzip"}
        obs.create_dataset(name, data=images.transpose(0, 3, 1, 2), **options)

    check(path, "robot0_eye_in_hand_image", replace_images(path, "robot0_eye_in_hand_image", write))
    assert inspect_dataset(path).files[0].cameras["robot0_eye_in_hand_image"].form == "channels first"


@pytest.mark.parametrize("first", [False, True])
def test_alpha_is_dropped_and_said(path, first):
    def write(obs, name, images):
        alpha = np.full((*images.shape[:3], 1), 9, np.uint8)
        rgba = np.concatenate([images, alpha], axis=-1)
        obs[name] = rgba.transpose(0, 3, 1, 2) if first else rgba

    check(path, CAMERA, replace_images(path, CAMERA, write))
    summary = inspect_dataset(path)
    assert summary.sound
    assert "RGBA, read without alpha" in "\n".join(summary.lines())


@pytest.mark.parametrize("axis", [1, 3, None])
def test_grey_frames_have_three_equal_channels(path, axis):
    def write(obs, name, images):
        grey = images[..., 0]
        obs[name] = grey if axis is None else np.expand_dims(grey, axis)

    images = replace_images(path, CAMERA, write)
    check(path, CAMERA, [np.repeat(demo[..., :1], 3, axis=-1) for demo in images])
    assert inspect_dataset(path).files[0].cameras[CAMERA].form == "grey, read as three equal channels"


def vlen(obs, name, data):
    rows = np.empty(len(data), object)
    rows[:] = [np.frombuffer(item, np.uint8) for item in data]
    obs.create_dataset(name, data=rows, dtype=h5py.vlen_dtype(np.uint8))


def padded(obs, name, data):
    width = max(map(len, data)) + 5
    obs[name] = np.stack([np.frombuffer(item.ljust(width, b"\0"), np.uint8) for item in data])


def padded_gzip(obs, name, data):
    padded(obs, name, data)
    rows = obs[name][()]
    del obs[name]
    obs.create_dataset(name, data=rows, chunks=(2, 100), compression="gzip")


def fixed_strings(obs, name, data):
    obs[name] = np.array(data, dtype=f"S{max(map(len, data))}")


STORED = {"vlen": vlen, "padded": padded, "padded gzip": padded_gzip, "fixed strings": fixed_strings}


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("stored", STORED)
def test_one_encoded_image_per_step_is_decoded_as_pillow_does(path, kind, stored):
    data = []

    def write(obs, name, images):
        data.append([encode(image, kind) for image in images])
        STORED[stored](obs, name, data[-1])

    replace_images(path, CAMERA, write)
    check(path, CAMERA, [np.stack([decoded(item) for item in demo]) for demo in data])
    summary = inspect_dataset(path)
    assert summary.sound
    assert summary.files[0].cameras[CAMERA].compression == kind
    assert Dataset.open(path).files[0].decoder.startswith("Pillow")


def test_encoded_images_may_be_grey_or_have_a_palette_or_alpha(path):
    def write(obs, name, images):
        modes = ("L", "P", "RGBA", "RGB")
        vlen(obs, name, [_save(Image.fromarray(image).convert(modes[i % 4])) for i, image in enumerate(images)])

    def _save(image):
        data = io.BytesIO()
        image.save(data, "PNG")
        return data.getvalue()

    replace_images(path, CAMERA, write)
    with h5py.File(path) as file:
        rows = [bytes(row) for row in file[f"data/demo_0/obs/{CAMERA}"][()]]
    np.testing.assert_array_equal(Dataset.open(path).frames(0, CAMERA), np.stack([decoded(row) for row in rows]))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-40], "frame 3 is a damaged JPEG image"),
        (lambda data: b"no image", "frame 3 is no JPEG or PNG image"),
        (lambda data: b"", "frame 3 is no JPEG or PNG image"),
        (lambda data: encode(np.zeros((8, 8, 3), np.uint8), "JPEG"), "frame 3 is 8×8, not 24×24"),
    ],
)
def test_a_damaged_encoded_frame_is_named(path, damage, said):
    def write(obs, name, images):
        data = [encode(image, "JPEG") for image in images]
        data[3] = damage(data[3])
        vlen(obs, name, data)

    replace_images(path, CAMERA, write)
    with Dataset.open(path) as dataset, pytest.raises(DatasetError, match=said) as error:
        dataset.frames(1, CAMERA)
    assert f"demo_1: '{CAMERA}'" in str(error.value)


def test_rows_of_bytes_that_are_no_images_are_left_out(path):
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            demo["obs"].create_dataset("words", data=[b"open the drawer"] * len(demo["actions"]))
            demo["obs/tactile"] = np.full((len(demo["actions"]), 80), 255, np.uint8)
            demo["obs"].create_dataset("points", (len(demo["actions"]),), h5py.vlen_dtype(np.float32))
    with Dataset.open(path) as dataset:
        assert list(dataset.cameras) == [CAMERA, "robot0_eye_in_hand_image"]
        assert dataset.choice.other_obs == ("points", "words")


def test_depth_normals_and_segmentation_are_left_out_and_named_ones_can_be_read(path):
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            length = len(demo["actions"])
            demo["obs/table_cam_normals"] = np.zeros((length, 24, 24, 3), np.float32)
            demo["obs/table_cam_depth"] = np.zeros((length, 24, 24, 1), np.float32)
            demo["obs/table_cam_segmentation"] = np.full((length, 24, 24, 4), 7, np.uint8)
            demo["obs/segmentation"] = np.full((length, 24, 24), 7, np.uint8)
    left_out = ("segmentation", "table_cam_depth", "table_cam_normals", "table_cam_segmentation")
    with Dataset.open(path) as dataset:
        assert list(dataset.cameras) == [CAMERA, "robot0_eye_in_hand_image"]
        assert dataset.choice.other_obs == left_out
    summary = inspect_dataset(path)
    assert summary.sound
    (note,) = (note for note in summary.files[0].notes if note.startswith("obs that are neither an rgb image"))
    assert all(name in note for name in left_out)
    with Dataset.open(path, cameras=["table_cam_segmentation"]) as dataset:
        assert (dataset.frames(0, "table_cam_segmentation") == 7).all()
