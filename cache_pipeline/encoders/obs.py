"""Checks and converts observations of users: keys, shapes, dtypes and image layouts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache_pipeline.encoders.preprocess import RANGE_SLACK
from cache_pipeline.errors import ConfigError, EncoderError, available


class ObsShapes(NamedTuple):
    """Obs shapes from ``shape_meta``.

    Attributes:
        cameras: camera → (H, W), in the order of ``shape_meta``.
        low_dim: key → shape, in the order of ``shape_meta``.
    """

    cameras: dict[str, tuple[int, int]]
    low_dim: dict[str, tuple[int, ...]]


def parse_shape_meta(shape_meta: Mapping[str, Any]) -> ObsShapes:
    """Reads ``{'obs': {key: {'shape': (3,H,W) | (H,W,3) | (n,…), 'type': 'rgb' | 'low_dim'}}}``; default: low_dim.

    Raises:
        EncoderError: wrong form, or no obs.
    """
    obs = shape_meta.get("obs")
    if not isinstance(obs, Mapping) or not obs:
        raise EncoderError("shape_meta has no obs; give {'obs': {key: {'shape': (3, H, W), 'type': 'rgb'}, …}}")
    cameras: dict[str, tuple[int, int]] = {}
    low_dim: dict[str, tuple[int, ...]] = {}
    for key, value in obs.items():
        shape, kind = tuple(value.get("shape", ())), value.get("type", "low_dim")
        if kind == "rgb":
            cameras[key] = _image_size(key, shape)
        elif kind == "low_dim":
            low_dim[key] = shape
        else:
            raise EncoderError(f"shape_meta: {key} has the type {kind!r}; {available(('rgb', 'low_dim'))}")
    return ObsShapes(cameras, low_dim)


def _image_size(key: str, shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) == 3 and shape[0] == 3:
        return shape[1], shape[2]
    if len(shape) == 3 and shape[2] == 3:
        return shape[0], shape[1]
    raise EncoderError(f"shape_meta: {key} has the shape {shape}; an rgb obs is (3, H, W) or (H, W, 3)")


def take(obs: Mapping[str, Any], key: str) -> Tensor:
    """Returns ``obs[key]`` (a NumPy array or anything that torch converts) as a tensor.

    Raises:
        EncoderError: the key is missing, or its values are not numbers.
    """
    if key not in obs:
        raise EncoderError(f"the obs {key!r} is missing; {available(obs, key)}")
    values = obs[key]
    if isinstance(values, Tensor):
        return values
    try:
        # torch does not accept negative strides (images[..., ::-1]) and warns about read-only memory.
        array = np.ascontiguousarray(values)
        return torch.as_tensor(array if array.flags.writeable else array.copy())
    except (TypeError, ValueError, RuntimeError) as error:
        raise EncoderError(
            f"{key}: the values are {type(values).__name__}, not numbers ({_first_line(error)}); "
            "give a NumPy array or a tensor"
        ) from error


def camera_frames(obs: Mapping[str, Any], camera: str, size: tuple[int, int]) -> tuple[Tensor, tuple[int, ...]]:
    """Returns frames of one camera as (M,H,W,3), uint8 or float32, and the leading shape (B,) or (B,T), M = B·T.

    Images are NumPy arrays or tensors, (…,3,H,W) or (…,H,W,3), uint8 or float on 0–1. ``size`` determines the layout.

    Raises:
        EncoderError: the camera is missing, or its images have a wrong shape, dtype or range.
    """
    images = take(obs, camera)
    height, width = size
    tail = tuple(images.shape[-3:])
    if images.dim() not in (4, 5) or tail not in ((3, height, width), (height, width, 3)):
        raise EncoderError(
            f"{camera}: images have the shape {tuple(images.shape)}; (B,…) or (B,T,…) of {(height, width, 3)} or "
            f"{(3, height, width)} are needed{_shape_advice(tuple(images.shape), size)}"
        )
    if images.dtype != torch.uint8:
        images = images if images.dtype == torch.float32 else _as_float(images, camera)
        _check_range(images, camera)
    leading, frames = tuple(images.shape[:-3]), images.reshape(-1, *tail)
    # 3×3 pixels fit both layouts: floats then count as channels first (torchvision), uint8 as channels last (files).
    channels_first = tail == (3, height, width) and (tail != (height, width, 3) or images.is_floating_point())
    return (frames.permute(0, 2, 3, 1) if channels_first else frames), leading


def _shape_advice(shape: tuple[int, ...], size: tuple[int, int]) -> str:
    height, width = size
    if len(shape) == 3:
        return "; add the batch axis, as in images[None]"
    for channels in (1, 4):
        if shape[-3:] in ((height, width, channels), (channels, height, width)):
            kind = "grey" if channels == 1 else "RGBA"
            return f"; these are {kind} images, and the encoder takes RGB"
    if len(shape) in (4, 5) and 3 in (shape[-1], shape[-3]):
        return f"; resize them to {height}×{width}, the size of the frames in the data"
    return ""


def _as_float(images: Tensor, camera: str) -> Tensor:
    if not images.is_floating_point():
        kind = str(images.dtype).removeprefix("torch.")
        raise EncoderError(f"{camera}: images are {kind}; give uint8 (0–255), or float on 0–1")
    return images.float()


def _check_range(images: Tensor, camera: str) -> None:
    if not images.numel():
        return
    low, high = (float(value) for value in images.aminmax())
    if low >= -RANGE_SLACK and high <= 1 + RANGE_SLACK:
        return
    if low >= 0 and 1 < high <= 255:
        advice = "divide them by 255, or give them as uint8"
    elif -1 - RANGE_SLACK <= low < 0 and high <= 1 + RANGE_SLACK:
        advice = "map -1…1 to 0…1 by (images + 1) / 2"
    else:
        advice = "do not normalise them; the encoder does"
    raise EncoderError(
        f"{camera}: float images range from {low:.4g} to {high:.4g}, but float pixels lie on 0–1; {advice}"
    )


def acting_obs(
    obs: Mapping[str, Any],
    cameras: Mapping[str, tuple[int, int]],
    features: Mapping[str, tuple[int, ...]],
    low_dim: Mapping[str, tuple[int, ...]],
    steps: int,
) -> dict[str, Tensor]:
    """Converts obs of a simulator or robot to the input of a policy; other keys are dropped.

    Args:
        obs: per camera images as in :func:`camera_frames`, or features at the cut; per low-dim key numbers of any type.
        cameras: camera → (H, W). features: camera → shape of a feature. low_dim: key → shape of one row.
        steps: To.

    Returns:
        Per camera (B,To,H,W,3) uint8 or float32 on 0–1, or (B,To,…) features; per low-dim key (B,To,…) float32.

    Raises:
        ConfigError: wrong number of obs steps.
        EncoderError: a key is missing, or has a wrong shape, dtype or range.
    """
    taken: dict[str, Tensor] = {}
    for camera, (height, width) in cameras.items():
        values = take(obs, camera)
        if not is_frames(values, features[camera]):
            taken[camera] = values
            continue
        frames, leading = camera_frames({camera: values}, camera, (height, width))
        if len(leading) != 2:
            raise EncoderError(
                f"{camera}: images have the shape {tuple(values.shape)}, without a batch or time axis; this policy "
                f"takes (B, {steps}, {height}, {width}, 3); images[None] adds the batch, images[:, None] the time axis"
            )
        taken[camera] = frames.reshape(*leading, height, width, 3)
    for key, shape in low_dim.items():
        values = take(obs, key)
        if values.is_complex() or values.dim() < 2 or math.prod(values.shape[2:]) != math.prod(shape):
            raise EncoderError(
                f"{key}: low-dim obs have the shape {tuple(values.shape)}; (B, {steps}, {math.prod(shape)}) is needed"
            )
        taken[key] = values.reshape(*values.shape[:2], *shape).float()
    for key, values in taken.items():
        if values.shape[1] != steps:
            raise ConfigError(f"{key} has {values.shape[1]} obs steps; this policy takes {steps}")
    one_lead({key: tuple(values.shape[:2]) for key, values in taken.items()})
    return taken


def is_frames(values: Tensor, feature_shape: tuple[int, ...]) -> bool:
    """Whether values of a camera are images, not features (…, *feature_shape) at the cut."""
    tail = tuple(values.shape[values.dim() - len(feature_shape) :])
    return values.dtype == torch.uint8 or not (
        values.is_floating_point()
        and values.dim() in (len(feature_shape) + 1, len(feature_shape) + 2)
        and tail == tuple(feature_shape)
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def low_dim_rows(obs: Mapping[str, Any], key: str, shape: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """Returns values of one low-dim key as (M, n), and the leading shape (B,) or (B,T), M = B·T.

    Raises:
        EncoderError: the key is missing, or its values have a wrong shape.
    """
    return _rows(take(obs, key), shape, key, "low-dim obs")


def feature_rows(features: Mapping[str, Any], camera: str, shape: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """Returns features of one camera as (M, D) or (M, D, h, w), and the leading shape (B,) or (B,T), M = B·T.

    Raises:
        EncoderError: the camera is missing, or its features do not have the shape of this encoder at its cut.
    """
    values = take(features, camera)
    leading = _leading(values, shape, camera, "features")
    return values.reshape(-1, *shape), leading


def _rows(values: Tensor, shape: tuple[int, ...], key: str, what: str) -> tuple[Tensor, tuple[int, ...]]:
    leading = _leading(values, shape, key, what)
    return values.reshape(math.prod(leading), -1), leading


def _leading(values: Tensor, shape: tuple[int, ...], key: str, what: str) -> tuple[int, ...]:
    extra = values.dim() - len(shape)
    if extra not in (1, 2) or tuple(values.shape[extra:]) != shape:
        raise EncoderError(
            f"{key}: {what} have the shape {tuple(values.shape)}; (B,…) or (B,T,…) of {shape} are needed"
        )
    return tuple(values.shape[:extra])


def one_lead(leads: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the leading shape of all obs; raises ``EncoderError`` if two differ."""
    # Compared with ==, because torch.export's dynamic batch size is not hashable.
    first, *others = leads.values()
    if any(lead != first for lead in others):
        raise EncoderError(f"obs differ in batch or time: {', '.join(f'{key} {lead}' for key, lead in leads.items())}")
    return first
