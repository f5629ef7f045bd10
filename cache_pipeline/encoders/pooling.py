"""Pooling of feature maps."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class SpatialSoftmax(nn.Module):
    """Maps (B,D,h,w) to expected keypoint positions (B, 2·keypoints): x and y on −1…1, alternating.

    As in robomimic's VisualCore (Finn et al., "Deep spatial autoencoders for visuomotor learning", 2016): a 1×1
    convolution to ``keypoints`` channels, a softmax over positions per channel, and the mean position.
    """

    pos_x: Tensor
    pos_y: Tensor

    def __init__(self, shape: tuple[int, int, int], keypoints: int = 32, temperature: float = 1.0) -> None:
        super().__init__()
        channels, height, width = shape
        self.keypoints, self.temperature = keypoints, temperature
        self.conv = nn.Conv2d(channels, keypoints, kernel_size=1)
        y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        self.register_buffer("pos_x", x.reshape(-1), persistent=False)
        self.register_buffer("pos_y", y.reshape(-1), persistent=False)

    @property
    def out_dim(self) -> int:
        """Width of the output."""
        return 2 * self.keypoints

    def forward(self, features: Tensor) -> Tensor:
        """Maps (B,D,h,w) to (B, 2·keypoints)."""
        weight = cast(Tensor, (self.conv(features).flatten(2) / self.temperature).softmax(-1))
        return torch.stack([weight @ self.pos_x, weight @ self.pos_y], dim=-1).flatten(1)
