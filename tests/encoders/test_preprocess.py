import pytest
import torch
import torchvision.transforms.v2.functional as vision

from cache_pipeline.encoders.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess, augment, preprocess
from cache_pipeline.errors import EncoderError


@pytest.fixture
def frames():
    return torch.randint(256, (3, 20, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_normalisation_equals_torchvisions(frames):
    wanted = vision.normalize(frames.permute(0, 3, 1, 2) / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
    torch.testing.assert_close(preprocess(frames, Preprocess()), wanted, rtol=1e-5, atol=1e-5)


def test_without_normalisation_pixels_stay_between_0_and_1(frames):
    found = preprocess(frames, Preprocess(imagenet_norm=False))
    assert torch.equal(found, frames.permute(0, 3, 1, 2).float() / 255)


def test_own_mean_and_std_are_applied(frames):
    found = preprocess(frames, Preprocess(mean=(0, 0, 0), std=(1 / 255,) * 3))
    torch.testing.assert_close(found, frames.permute(0, 3, 1, 2).float(), rtol=1e-5, atol=1e-3)


def test_float_frames_on_0_to_1_equal_uint8_frames(frames):
    torch.testing.assert_close(preprocess(frames / 255, Preprocess()), preprocess(frames, Preprocess()))


def test_float_frames_on_0_to_255_are_refused(frames):
    with pytest.raises(EncoderError, match="float pixels lie on 0–1"):
        preprocess(frames.float(), Preprocess())


def test_normalised_and_nan_floats_are_refused(frames):
    for bad in (preprocess(frames, Preprocess()).permute(0, 2, 3, 1), torch.full((1, 4, 4, 3), float("nan"))):
        with pytest.raises(EncoderError, match="float pixels lie on 0–1"):
            preprocess(bad, Preprocess())


def test_signed_integers_and_other_shapes_are_refused(frames):
    with pytest.raises(EncoderError, match="int64"):
        preprocess(frames.long(), Preprocess())
    with pytest.raises(EncoderError, match="shape"):
        preprocess(frames.permute(0, 3, 1, 2), Preprocess())


def test_the_clean_crop_is_the_centre(frames):
    found = augment(frames, Preprocess(crop_shape=(16, 20)))
    assert torch.equal(found, frames[:, 2:18, 2:22].permute(0, 3, 1, 2).float() / 255)


def test_a_crop_larger_than_the_frame_is_refused(frames):
    with pytest.raises(EncoderError, match="larger than the 20×24 frame"):
        preprocess(frames, Preprocess(crop_shape=(21, 20)))


def test_resize_comes_before_crop_and_equals_torchvisions(frames):
    images = frames.permute(0, 3, 1, 2) / 255
    resized = vision.resize(images, [12, 12], antialias=True)
    found = augment(frames, Preprocess(resize_shape=(12, 12), crop_shape=(8, 8)))
    torch.testing.assert_close(found, resized[:, :, 2:10, 2:10], rtol=1e-4, atol=1e-4)
    assert Preprocess(resize_shape=(12, 12), crop_shape=(8, 8)).output_shape(20, 24) == (8, 8)


def test_a_frame_does_not_depend_on_its_batch_mates(frames):
    p = Preprocess(resize_shape=(15, 15), crop_shape=(9, 9))
    assert torch.equal(preprocess(frames, p)[:1], preprocess(frames[:1], p))


def test_json_gives_the_same_preprocessing_again(frames):
    p = Preprocess(resize_shape=(12, 12), crop_shape=(8, 8), imagenet_norm=False)
    again = Preprocess.from_json(p.to_json())
    assert again.to_json() == p.to_json()
    assert torch.equal(preprocess(frames, again), preprocess(frames, p))


def test_json_is_equal_for_settings_of_equal_effect():
    assert Preprocess().to_json() == Preprocess(mean=IMAGENET_MEAN, std=IMAGENET_STD).to_json()
    assert Preprocess().to_json() != Preprocess(imagenet_norm=False).to_json()


@pytest.mark.parametrize(
    "options",
    [{"crop_shape": (0, 4)}, {"resize_shape": 84}, {"mean": (0, 0, 0)}, {"std": (1, 1, 0), "mean": (0, 0, 0)}],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(EncoderError):
        Preprocess(**options)
