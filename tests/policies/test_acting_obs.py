"""Obs as NumPy or torch, uint8 or float, in both layouts give the same actions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cache_fakes import Tiny

from cache_pipeline.encoders.obs_encoder import MultiImageObsEncoder
from cache_pipeline.errors import ConfigError, EncoderError
from cache_pipeline.policies.mlp import MLPConfig, MLPPolicy
from cache_pipeline.policies.visuomotor import VisuomotorPolicy

CAMERAS, KEY = ("front", "wrist"), "eef_pose"
STEPS, HEIGHT, WIDTH = 2, 24, 32


@pytest.fixture(scope="module")
def policy():
    shapes = {camera: {"shape": (HEIGHT, WIDTH, 3), "type": "rgb"} for camera in CAMERAS}
    shapes[KEY] = {"shape": (4,), "type": "low_dim"}
    torch.manual_seed(0)
    encoder = MultiImageObsEncoder({"obs": shapes}, Tiny(0), 8)
    head = MLPPolicy(STEPS * 8, 3, 5, MLPConfig(hidden=(16,)))
    return VisuomotorPolicy(encoder, head, (STEPS, 3, 5), clip_actions=False).eval()


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return {camera: rng.integers(0, 256, (2, STEPS, HEIGHT, WIDTH, 3), np.uint8) for camera in CAMERAS}


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(1).normal(size=(2, STEPS, 4)).astype(np.float32)


def first(array):
    return np.moveaxis(array, -1, -3)


WAYS = {
    "numpy uint8": lambda image: image,
    "numpy uint8, not writeable": lambda image: np.frombuffer(image.tobytes(), np.uint8).reshape(image.shape),
    "numpy uint8, negative strides": lambda image: np.ascontiguousarray(image[..., ::-1])[..., ::-1],
    "numpy uint8, channels first": first,
    "numpy float32 on 0-1": lambda image: image.astype(np.float32) / 255,
    "numpy float64 on 0-1, channels first": lambda image: first(image) / 255,
    "torch uint8": torch.from_numpy,
    "torch uint8, channels first": lambda image: torch.from_numpy(image).movedim(-1, -3),
    "torch float on 0-1": lambda image: torch.from_numpy(image).float() / 255,
    "torch float64 on 0-1, channels first": lambda image: torch.from_numpy(image).movedim(-1, -3).double() / 255,
}


@pytest.mark.parametrize("way", WAYS)
def test_images_of_every_kind_give_the_same_actions(way, policy, images, rows):
    expected = policy.act({**{c: torch.from_numpy(v) for c, v in images.items()}, KEY: torch.from_numpy(rows)})
    acted = policy.act({**{camera: WAYS[way](image) for camera, image in images.items()}, KEY: rows})
    torch.testing.assert_close(acted, expected, atol=1e-6, rtol=0)


def test_cameras_may_come_in_different_kinds(policy, images, rows):
    mixed = {"front": images["front"], "wrist": torch.from_numpy(first(images["wrist"])).float() / 255, KEY: rows}
    torch.testing.assert_close(policy.act(mixed), policy.act({**images, KEY: rows}), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "change", [np.float64, np.float16, torch.from_numpy, np.ndarray.tolist, lambda r: r[:, :, None]]
)
def test_low_dim_obs_of_every_kind_give_the_same_actions(change, policy, images, rows):
    expected = policy.act({**images, KEY: rows})
    torch.testing.assert_close(policy.act({**images, KEY: change(rows)}), expected, atol=2e-3, rtol=0)


def test_acting_does_not_change_the_callers_obs(policy, images, rows):
    before = {camera: image.copy() for camera, image in images.items()}
    policy.act({**images, KEY: rows})
    assert all(np.array_equal(before[camera], image) for camera, image in images.items())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            lambda image: image.astype(np.float32),
            EncoderError,
            ["front: float images range", "255", "divide them by 255"],
        ),
        (lambda image: image / 127.5 - 1, EncoderError, ["float images range from -1", "(images + 1) / 2"]),
        (lambda image: (image / 255 - 0.4) / 0.2, EncoderError, ["float pixels lie on 0–1", "do not normalise them"]),
        (lambda image: image.astype(np.int64), EncoderError, ["front: images are int64", "uint8"]),
        (lambda image: image > 3, EncoderError, ["front: images are bool"]),
        (lambda image: image[0], EncoderError, ["without a batch or time axis", f"(B, 2, {HEIGHT}, {WIDTH}, 3)"]),
        (lambda image: image[:, 0], EncoderError, ["without a batch or time axis"]),
        (lambda image: image[0, 0], EncoderError, ["images have the shape (24, 32, 3)", "batch axis"]),
        (lambda image: image[..., :1], EncoderError, ["grey", "RGB"]),
        (lambda image: image[..., [0, 1, 2, 0]], EncoderError, ["RGBA", "RGB"]),
        (lambda image: image[:, :, :20], EncoderError, ["resize them to 24×32"]),
        (lambda image: image[:, [0, 0, 1]], ConfigError, ["front has 3 obs steps; this policy takes 2"]),
        (lambda image: image[:1], EncoderError, ["differ in batch"]),
        (lambda image: np.full(image.shape, np.nan), EncoderError, ["float images range from nan"]),
        (lambda image: "a.png", EncoderError, ["front", "str", "NumPy array or a tensor"]),
    ],
)
def test_unusable_images_are_an_error_that_describes_the_images(change, error, words, policy, images, rows):
    with pytest.raises(error) as caught:
        policy.act({**images, "front": change(images["front"]), KEY: rows})
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_missing_keys_and_low_dim_obs_of_another_width_are_named(policy, images, rows):
    with pytest.raises(EncoderError, match="'wrist' is missing; available: front, eef_pose"):
        policy.act({"front": images["front"], KEY: rows})
    with pytest.raises(EncoderError, match=r"eef_pose: low-dim obs have the shape \(2, 2, 3\); \(B, 2, 4\) is needed"):
        policy.act({**images, KEY: rows[..., :3]})
    with pytest.raises(EncoderError, match="eef_pose"):
        policy.act({**images, KEY: rows[0]})


def test_features_at_the_cut_still_enter_in_place_of_images(policy, images, rows):
    features = policy.obs_encoder.features({**images, KEY: rows})
    torch.testing.assert_close(
        policy.act({**features, KEY: rows}), policy.act({**images, KEY: rows}), atol=1e-6, rtol=0
    )


def test_the_obs_encoder_takes_them_too(policy, images, rows):
    encoder = policy.obs_encoder
    with torch.no_grad():
        expected = encoder({**{c: torch.from_numpy(v) for c, v in images.items()}, KEY: torch.from_numpy(rows)})
        for way in WAYS.values():
            acted = encoder({**{camera: way(image) for camera, image in images.items()}, KEY: rows.astype(np.float64)})
            torch.testing.assert_close(acted, expected, atol=1e-6, rtol=0)
    with pytest.raises(EncoderError, match="divide them by 255"):
        encoder({**images, "front": images["front"].astype(np.float32), KEY: rows})
