"""Augmentation of live frames: one draw per window and camera, the same for all obs steps."""

from __future__ import annotations

import math

import torch

from cache_pipeline.encoders.view_spec import ViewSpec
from cache_pipeline.encoders.views import ViewBatch
from cache_pipeline.policies.draws import Draws, uniform


def draw_views(spec: ViewSpec, leading: tuple[int, ...], draws: Draws, device: torch.device) -> ViewBatch:
    """Draws views for frames with the leading shape (B,) or (B,T), distributed like the cached views of ``spec``.

    Crops have an effect only if the preprocessing has a ``crop_shape``.
    """
    drawn = uniform((leading[0], 6), draws, device)
    spread = drawn.new_tensor([spec.brightness, spec.contrast, spec.saturation, spec.hue])
    color = drawn.new_tensor([1.0, 1.0, 1.0, 0.0]) + (2 * drawn[:, 2:] - 1) * spread
    crop = drawn[:, :2] if spec.random_crop else torch.full_like(drawn[:, :2], 0.5)
    steps = math.prod(leading[1:])
    return ViewBatch(crop.repeat_interleave(steps, dim=0), color.repeat_interleave(steps, dim=0))
