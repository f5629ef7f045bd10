"""Views: fixed augmentations of frames that depend only on (seed, demo, camera, view). View 0 is clean."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache_pipeline.encoders.view_spec import ViewSpec
from cache_pipeline.errors import EncoderError
from cache_pipeline.files import digest

LUMA = (0.299, 0.587, 0.114)
RGB_TO_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


class ViewParameters(NamedTuple):
    """One augmentation; the defaults are the clean view.

    Attributes:
        crop: position of the crop, from (0, 0) top left to (1, 1) bottom right; (0.5, 0.5) is the centre.
        brightness, contrast, saturation: factors; 1 means no change.
        hue: rotation of the hue, in turns.
    """

    crop: tuple[float, float] = (0.5, 0.5)
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0


class ViewBatch(NamedTuple):
    """One augmentation per frame of a batch: crop (B,2); color (B,4), or ``None`` for unchanged colours."""

    crop: Tensor
    color: Tensor | None = None


View = ViewParameters | Sequence[ViewParameters] | ViewBatch


def view_parameters(spec: ViewSpec, demo: str, camera: str, view: int) -> ViewParameters:
    """Returns the augmentation of all frames of one camera, demo and view.

    Args:
        spec: distribution of views.
        demo: identifier of the demo that does not depend on its file: its digest or name.
        camera: the camera's name.
        view: 0 is the clean view; 1, 2, … are drawn.
    """
    if view < 0:
        raise EncoderError(f"there is no view {view}; views are numbered from 0")
    if view == 0:
        return ViewParameters()
    key = digest(json.dumps([spec.seed, demo, camera, view]).encode())
    y, x, *color = np.random.Generator(np.random.Philox(key=int(key, 16))).random(6)
    brightness, contrast, saturation, hue = (2 * u - 1 for u in color)
    return ViewParameters(
        crop=(float(y), float(x)) if spec.random_crop else (0.5, 0.5),
        brightness=float(1 + spec.brightness * brightness),
        contrast=float(1 + spec.contrast * contrast),
        saturation=float(1 + spec.saturation * saturation),
        hue=float(spec.hue * hue),
    )


def view_batch(view: View, count: int, device: torch.device) -> ViewBatch:
    """Converts one augmentation for all frames, or one per frame, to tensors for ``count`` frames."""
    if isinstance(view, ViewBatch):
        rows = view.crop.shape[0]
    else:
        views = [view] * count if isinstance(view, ViewParameters) else list(view)
        rows = len(views)
        colors = [(v.brightness, v.contrast, v.saturation, v.hue) for v in views]
        plain = all(color == (1.0, 1.0, 1.0, 0.0) for color in colors)
        color = None if plain else torch.tensor(colors, dtype=torch.float32, device=device)
        view = ViewBatch(torch.tensor([v.crop for v in views], dtype=torch.float64, device=device), color)
    if rows != count:
        raise EncoderError(f"{rows} views were given for {count} frames; give one for all frames or one per frame")
    return view


def crop_frames(frames: Tensor, shape: tuple[int, int], view: ViewBatch | None) -> Tensor:
    """Crops frames (B,H,W,3) of any dtype to (B,h,w,3), at the centre or at the positions of ``view``.

    Raises:
        EncoderError: the crop is larger than the frame.
    """
    (height, width), (h, w) = frames.shape[1:3], shape
    if h > height or w > width:
        raise EncoderError(f"the crop {h},{w} is larger than the {height}×{width} frame; give a smaller --crop-shape")
    if view is None:
        top, left = (height - h + 1) // 2, (width - w + 1) // 2
        return frames[:, top : top + h, left : left + w]
    room = torch.tensor([height - h, width - w], device=frames.device)
    # [0, 1) is divided equally among all positions; 0.5 is the centre, as in the clean view.
    place = (view.crop.to(frames.device, torch.float64) * (room + 1)).long().clamp_(max=room)
    rows = torch.arange(len(frames), device=frames.device)
    windows = frames.unfold(1, h, 1).unfold(2, w, 1)
    return windows[rows, place[:, 0], place[:, 1]].permute(0, 2, 3, 1)


def jitter_colors(images: Tensor, color: Tensor) -> Tensor:
    """Changes brightness, contrast about the frame's mean luma, saturation and hue; clamps to 0–1 at the end.

    This is one affine map of RGB per frame: saturation scales and hue rotates the chroma plane of YIQ.

    Args:
        images: (B,3,H,W), 0–1.
        color: (B,4): factors of brightness, contrast and saturation, and the hue rotation in turns.
    """
    brightness, contrast, saturation, hue = color.to(images).unbind(1)
    to_yiq = images.new_tensor(RGB_TO_YIQ)
    angle = hue * (2 * math.pi)
    turn = torch.zeros(len(images), 3, 3, dtype=images.dtype, device=images.device)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = saturation * angle.cos()
    turn[:, 1, 2], turn[:, 2, 1] = -saturation * angle.sin(), saturation * angle.sin()
    chroma = torch.linalg.inv(to_yiq) @ turn @ to_yiq
    matrix = chroma * (brightness * contrast)[:, None, None]
    luma = (images.mean((2, 3)) @ images.new_tensor(LUMA)) * brightness
    shift = (chroma @ images.new_ones(3)) * (luma * (1 - contrast))[:, None]
    mixed = torch.einsum("bij,bjhw->bihw", matrix, images) + shift[:, :, None, None]
    return mixed.clamp_(0, 1)
