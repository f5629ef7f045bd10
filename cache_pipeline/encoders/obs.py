"""Observations as users give them: which keys there are, and images in either layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cache_pipeline.errors import EncoderError, available


class ObsShapes(NamedTuple):
    """What ``shape_meta`` says.

    Attributes:
        cameras: camera → (H, W), in the order of ``shape_meta``.
        low_dim: key → shape, in the order of ``shape_meta``.
    """

    cameras: dict[str, tuple[int, int]]
    low_dim: dict[str, tuple[int, ...]]


def parse_shape_meta(shape_meta: Mapping[str, Any]) -> ObsShapes:
    """Reads ``{'obs': {key: {'shape': (3,H,W) | (H,W,3) | (n,…), 'type': 'rgb' | 'low_dim'}}}``; no type is low-dim.

    Raises:
        EncoderError: it is not of that form, or has no obs.
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


def take(obs: Mapping[str, Tensor], key: str) -> Tensor:
    """``obs[key]``; raises ``EncoderError`` with the keys that are there."""
    if key not in obs:
        raise EncoderError(f"the obs {key!r} is missing; {available(obs, key)}")
    return torch.as_tensor(obs[key])


def camera_frames(obs: Mapping[str, Tensor], camera: str, size: tuple[int, int]) -> tuple[Tensor, tuple[int, ...]]:
    """Frames of one camera as (M,H,W,3), and the leading dimensions (B,) or (B,T) that make up M.

    Images are (…,3,H,W) or (…,H,W,3), uint8 or float on 0–1; ``size`` tells the layouts apart.

    Raises:
        EncoderError: the camera is missing, or its images have another shape.
    """
    images = take(obs, camera)
    height, width = size
    tail = tuple(images.shape[-3:])
    if images.dim() not in (4, 5) or tail not in ((3, height, width), (height, width, 3)):
        raise EncoderError(
            f"{camera}: images have the shape {tuple(images.shape)}; (B,…) or (B,T,…) of {(3, height, width)} or "
            f"{(height, width, 3)} are needed, as shape_meta says"
        )
    leading, frames = tuple(images.shape[:-3]), images.reshape(-1, *tail)
    # 3×3 pixels fit both: floats come channels first, as from torchvision, and uint8 as it lies in a file.
    channels_first = tail == (3, height, width) and (tail != (height, width, 3) or images.is_floating_point())
    return (frames.permute(0, 2, 3, 1) if channels_first else frames), leading


def low_dim_rows(obs: Mapping[str, Tensor], key: str, shape: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """Values of one low-dim key as (M, n), and the leading dimensions (B,) or (B,T) that make up M.

    Raises:
        EncoderError: the key is missing, or its values have another shape.
    """
    return _rows(take(obs, key), shape, key, "low-dim obs")


def feature_rows(features: Mapping[str, Tensor], camera: str, shape: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """Features of one camera as (M, D) or (M, D, h, w), and the leading dimensions (B,) or (B,T) that make up M.

    Raises:
        EncoderError: the camera is missing, or its features are not those of this encoder at its cut.
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
    """The leading dimensions that all obs share; raises ``EncoderError`` where two differ."""
    # Compared, not hashed: torch.export's dynamic batch size cannot be hashed.
    first, *others = leads.values()
    if any(lead != first for lead in others):
        raise EncoderError(f"obs differ in batch or time: {', '.join(f'{key} {lead}' for key, lead in leads.items())}")
    return first
