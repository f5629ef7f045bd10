"""Affine normalisation. Its statistics are buffers, which are saved with the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cache_pipeline.policies.rotations import RotationSlices

Normalization = Literal["minmax", "gaussian", "none"]

# Variations below this fraction of the values' magnitude are rounding errors of the stored dtype.
ROUNDING = {"float16": 1e-3, "float32": 1e-6}


class Normalizer(nn.Module):
    """Maps values (…, *shape) to (values - offset) * scale and back.

    If a dimension is constant in the fitted data, ``forward`` subtracts the constant (scale 1) and ``invert`` always
    returns the constant.
    """

    offset: Tensor
    scale: Tensor
    spread: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("offset", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("spread", torch.ones(shape))

    def fit(self, rows: NDArray, mode: Normalization, rounding: float = ROUNDING["float32"]) -> Normalizer:
        """Computes the statistics of ``rows`` (N, *shape): ``minmax`` to [-1, 1], ``gaussian`` to mean 0, deviation 1.

        Args:
            rounding: relative precision of the values; a dimension that varies less counts as constant.

        Returns:
            self.
        """
        if mode == "none":
            return self
        rows = np.asarray(rows, np.float64)
        assert rows.shape[1:] == tuple(self.offset.shape), (rows.shape, self.offset.shape)
        if mode == "minmax":
            low, high = rows.min(0), rows.max(0)
            offset, spread = (low + high) / 2, (high - low) / 2
        else:
            offset, spread = rows.mean(0), rows.std(0)
        flat = spread <= rounding * np.maximum(np.abs(offset), 1e-3)
        self.offset.copy_(torch.from_numpy(np.asarray(offset)))
        self.scale.copy_(torch.from_numpy(np.asarray(1 / np.where(flat, 1.0, spread))))
        self.spread.copy_(torch.from_numpy(np.asarray(np.where(flat, 0.0, spread))))
        return self

    def forward(self, values: Tensor) -> Tensor:
        return (values - self.offset) * self.scale

    def invert(self, values: Tensor) -> Tensor:
        """Inverts ``forward``."""
        return values * self.spread + self.offset

    def join(self, parts: Sequence[Normalizer]) -> None:
        """Copies the statistics of ``parts``, flattened and concatenated."""
        for name in ("offset", "scale", "spread"):
            own = getattr(self, name)
            own.copy_(torch.cat([getattr(part, name).flatten() for part in parts]).view_as(own))


class ActionNormalizer(Normalizer):
    """Normalises actions (…, A); axis-angle rotations are converted to six numbers each before, and back after."""

    def __init__(self, rotations: RotationSlices) -> None:
        super().__init__((rotations.encoded_width,))
        self._rotations = rotations

    def fit(self, rows: NDArray, mode: Normalization, rounding: float = ROUNDING["float32"]) -> Normalizer:
        encoded = self._rotations.encode(torch.from_numpy(np.asarray(rows, np.float64)))
        return super().fit(encoded.numpy(), mode, rounding)

    def forward(self, values: Tensor) -> Tensor:
        return super().forward(self._rotations.encode(values))

    def invert(self, values: Tensor) -> Tensor:
        return self._rotations.decode(super().invert(values))
