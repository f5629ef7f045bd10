"""Rotations as six numbers: the first two columns of the rotation matrix, a continuous representation.

Zhou et al., On the Continuity of Rotation Representations in Neural Networks, 2019 (arXiv:1812.07035).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from cache_pipeline.errors import ConfigError

AXIS_ANGLE, SIX = 3, 6


def axis_angle_to_6d(axis_angle: Tensor) -> Tensor:
    """Maps axis times angle in radians, (…,3), to (…,6)."""
    x, y, z = axis_angle.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), -1).reshape(*x.shape, 3, 3)
    columns = torch.linalg.matrix_exp(cross.double())[..., :2]
    return columns.transpose(-1, -2).flatten(-2).to(axis_angle.dtype)


def axis_angle_from_6d(six: Tensor) -> Tensor:
    """Maps (…,6) to the nearest rotation (Gram-Schmidt) as axis times angle, (…,3), with the angle in [0, π]."""
    first, second = six[..., :3], six[..., 3:]
    one = F.normalize(first, dim=-1)
    two = F.normalize(second - (one * second).sum(-1, keepdim=True) * one, dim=-1)
    matrix = torch.stack((one, two, torch.linalg.cross(one, two, dim=-1)), dim=-1)
    return _axis(_quaternion(matrix))


def _quaternion(matrix: Tensor) -> Tensor:
    """Maps (…,3,3) to unit quaternions (…,4), w first and w ≥ 0; computes the largest component first."""
    m = matrix.flatten(-2).unbind(-1)
    xx, yy, zz = m[0], m[4], m[8]
    rows = (
        (1 + xx + yy + zz, m[7] - m[5], m[2] - m[6], m[3] - m[1]),
        (m[7] - m[5], 1 + xx - yy - zz, m[3] + m[1], m[2] + m[6]),
        (m[2] - m[6], m[3] + m[1], 1 - xx + yy - zz, m[7] + m[5]),
        (m[3] - m[1], m[2] + m[6], m[7] + m[5], 1 - xx - yy + zz),
    )
    candidates = torch.stack([torch.stack(row, -1) for row in rows], -2)
    largest = candidates.diagonal(dim1=-2, dim2=-1).argmax(-1)
    index = largest[..., None, None].expand(*largest.shape, 1, 4)
    chosen = F.normalize(candidates.gather(-2, index).squeeze(-2), dim=-1)
    return torch.where(chosen[..., :1] < 0, -chosen, chosen)


def _axis(quaternion: Tensor) -> Tensor:
    w, vector = quaternion[..., :1], quaternion[..., 1:]
    sine = vector.norm(dim=-1, keepdim=True)
    angle = 2 * torch.atan2(sine, w)
    return vector * torch.where(sine > 1e-6, angle / sine.clamp_min(1e-6), 2 * torch.ones_like(sine))


class RotationSlices:
    """Slices of axis-angle rotations in a vector of ``width`` numbers; converts each to six numbers and back.

    Raises:
        ConfigError: a slice is outside the vector or not of length 3, or two slices overlap.
    """

    def __init__(self, slices: tuple[tuple[int, int], ...], width: int) -> None:
        self._starts = sorted(start for start, _ in slices)
        self.width = width
        ends = [0, *(start + AXIS_ANGLE for start in self._starts)]
        for start, stop in slices:
            if stop - start != AXIS_ANGLE or not 0 <= start < stop <= width:
                raise ConfigError(
                    f"rotation_6d {start}:{stop} is not an axis-angle rotation: give three of the {width} action "
                    f"dimensions, such as 3:6"
                )
        if any(start < end for start, end in zip(self._starts, ends, strict=False)):
            raise ConfigError(f"rotation_6d: the slices {', '.join(f'{a}:{b}' for a, b in slices)} overlap")

    @property
    def encoded_width(self) -> int:
        return self.width + (SIX - AXIS_ANGLE) * len(self._starts)

    def encode(self, values: Tensor) -> Tensor:
        """Maps (…,width) to (…,encoded_width); rotations keep their position."""
        return self._mapped(values, AXIS_ANGLE, axis_angle_to_6d)

    def decode(self, values: Tensor) -> Tensor:
        """Inverts ``encode``; any six numbers map to the nearest rotation."""
        return self._mapped(values, SIX, axis_angle_from_6d)

    def _mapped(self, values: Tensor, size: int, function: Callable[[Tensor], Tensor]) -> Tensor:
        parts, at = [], 0
        for number, start in enumerate(self._starts):
            begin = start + number * (size - AXIS_ANGLE)
            parts += [values[..., at:begin], function(values[..., begin : begin + size])]
            at = begin + size
        return torch.cat([*parts, values[..., at:]], dim=-1) if parts else values
