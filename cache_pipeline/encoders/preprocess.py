"""Preprocessing of frames, the same function for extraction, training, fine-tuning and rollout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cache_pipeline.encoders.view_spec import ViewSpec
from cache_pipeline.encoders.views import View, ViewBatch, crop_frames, jitter_colors, view_batch
from cache_pipeline.errors import ConfigError, EncoderError
from cache_pipeline.files import typed

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RANGE_SLACK = 1e-3

Shape = tuple[int, int]
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Preprocess:
    """Preprocessing of a frame: flip, then resize, then crop, then normalise."""

    resize_shape: Shape | None = None
    """(H, W) in pixels; bilinear with antialiasing."""
    crop_shape: Shape | None = None
    """(H, W) in pixels, cropped after resizing; the clean view crops the centre."""
    imagenet_norm: bool = True
    """Subtract ImageNet's mean and divide by its standard deviation; if false, pixels stay on 0–1."""
    mean: Triple | None = None
    """RGB mean of pixels on 0–1 instead of ImageNet's; ``imagenet_norm`` is then ignored."""
    std: Triple | None = None
    """RGB standard deviation; required with ``mean``."""
    flip: bool = False
    """Turn frames upside down: for datasets and environments that give the lowest row first, such as LIBERO's."""

    def __post_init__(self) -> None:
        for name in ("resize_shape", "crop_shape"):
            object.__setattr__(self, name, _shape(name, getattr(self, name)))
        if (self.mean is None) != (self.std is None):
            raise EncoderError("preprocessing: mean and std must be given together")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None and len(value) != 3:
                raise EncoderError(f"preprocessing: {name} has {len(value)} values; give one each for red, green, blue")
            object.__setattr__(self, name, None if value is None else tuple(float(v) for v in value))
        if self.std is not None and min(self.std) <= 0:
            raise EncoderError(f"preprocessing: std {self.std} must be positive")

    @property
    def normalization(self) -> tuple[Triple, Triple] | None:
        """The applied mean and standard deviation, or ``None``."""
        if self.mean is not None and self.std is not None:
            return self.mean, self.std
        return (IMAGENET_MEAN, IMAGENET_STD) if self.imagenet_norm else None

    def output_shape(self, height: int, width: int) -> Shape:
        """Returns the height and width of the encoder's input for frames of this size."""
        return self.crop_shape or self.resize_shape or (height, width)

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object for the encoder's identity; settings with the same effect give the same object."""
        mean, std = self.normalization or ((0.0,) * 3, (1.0,) * 3)
        shapes = {"resize_shape": self.resize_shape, "crop_shape": self.crop_shape}
        return {
            **{name: None if shape is None else list(shape) for name, shape in shapes.items()},
            "mean": list(mean),
            "std": list(std),
            **({"flip": True} if self.flip else {}),  # left out otherwise: earlier caches do not have it
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Preprocess:
        """Inverts ``to_json``, up to settings with the same effect; raises EncoderError for any other value."""
        try:
            made: Preprocess = typed(value, cls)
        except ValueError as error:
            raise EncoderError(f"the recorded preprocessing cannot be read: {error}") from error
        return made


def check_views(spec: ViewSpec, p: Preprocess, frame: Shape) -> str | None:
    """Checks what augmented views change of frames (height, width).

    Returns:
        A sentence if they change colours only, although ``random_crop`` is on; else None.

    Raises:
        ConfigError: they would all equal the clean view.
    """
    if not spec.random_crop or p.crop_shape not in (None, p.resize_shape or frame):
        return None
    if not any((spec.brightness, spec.contrast, spec.saturation, spec.hue)):
        raise ConfigError(
            "all augmented views would equal the clean view: the crop leaves nothing out and no colour changes; give a "
            "--crop-shape smaller than the frame, or a jitter such as --brightness 0.3"
        )
    return "augmented views differ in colour only: random crops need a --crop-shape smaller than the frame"


def preprocess(frames: Tensor, p: Preprocess, view: View | None = None) -> Tensor:
    """Converts frames to the encoder's input.

    Args:
        frames: (B,H,W,3) uint8, or float on 0–1, on any device.
        p: the preprocessing.
        view: one augmentation for all frames, or one per frame; None: the clean view.

    Returns:
        (B,3,h,w) float32, normalised, in channels-last memory format.

    Raises:
        EncoderError: wrong shape or dtype, float pixels outside 0–1, or a crop larger than the frame.
    """
    images = augment(frames, p, view)
    if p.normalization is None:
        return images
    return _normalize(images, *p.normalization)


def _normalize(images: Tensor, mean: Triple, std: Triple) -> Tensor:
    """Normalises whole rows of pixels (B,h,3w), which vectorises; three values at a time do not."""
    pixels = images.permute(0, 2, 3, 1)
    rows = pixels.reshape(*pixels.shape[:2], -1)
    means, stds = (images.new_tensor(value).repeat(pixels.shape[2]) for value in (mean, std))
    return torch.addcmul(-means / stds, rows, 1 / stds).view(pixels.shape).permute(0, 3, 1, 2)


def augment(frames: Tensor, p: Preprocess, view: View | None = None) -> Tensor:
    """Applies ``preprocess`` without normalisation: (B,3,h,w) float32 pixels on 0–1."""
    check_frames(frames)
    batch = None if view is None else view_batch(view, len(frames), frames.device)
    if p.flip:
        frames = frames.flip(1)
    if p.resize_shape is not None and p.resize_shape != tuple(frames.shape[1:3]):
        size = list(p.resize_shape)
        images = functional.interpolate(_pixels(frames), size, mode="bilinear", antialias=True, align_corners=False)
        frames = images.permute(0, 2, 3, 1)
    if p.crop_shape is not None:
        frames = crop_frames(frames, p.crop_shape, batch)
    return _color(_pixels(frames), batch)


def _color(images: Tensor, batch: ViewBatch | None) -> Tensor:
    return images if batch is None or batch.color is None else jitter_colors(images, batch.color)


def _pixels(frames: Tensor) -> Tensor:
    images = frames.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return images.float().div_(255) if images.dtype == torch.uint8 else images.float()


def check_frames(frames: Tensor) -> None:
    """Raises ``EncoderError`` unless frames are (B,H,W,3), uint8 or float on 0–1."""
    if frames.dim() != 4 or frames.shape[-1] != 3:
        raise EncoderError(f"frames have the shape {tuple(frames.shape)}; RGB frames (B,H,W,3) are needed")
    if frames.dtype == torch.uint8 or not len(frames):
        return
    if not frames.is_floating_point():
        raise EncoderError(f"frames are {frames.dtype}; give uint8 (0–255) or float on 0–1")
    low, high = (float(value) for value in frames.aminmax())
    if not (low >= -RANGE_SLACK and high <= 1 + RANGE_SLACK):
        raise EncoderError(
            f"float frames range from {low:.4g} to {high:.4g}, but float pixels lie on 0–1; "
            f"give 0–255 as uint8 or divide by 255, and leave normalisation to the encoder"
        )


def _shape(name: str, value: Any) -> Shape | None:
    if value is None:
        return None
    pair = tuple(value) if isinstance(value, tuple | list) else (value,)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise EncoderError(f"preprocessing: {name} is {value!r}; give two positive numbers of pixels, height and width")
    return pair[0], pair[1]
