"""Small policies with random weights for the environment of walk.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from cache_pipeline.encoders.obs_encoder import MultiImageObsEncoder
from cache_pipeline.policies.flow import FlowConfig, FlowPolicy
from cache_pipeline.policies.gmm import GMMConfig, GMMPolicy
from cache_pipeline.policies.mlp import MLPConfig, MLPPolicy
from cache_pipeline.policies.visuomotor import VisuomotorPolicy

SIZE = 8
SHAPES = {"front_image": (SIZE, SIZE), "wrist_image": (SIZE, SIZE)}
HEADS: dict[str, Callable[[int, int], torch.nn.Module]] = {
    "flow": lambda cond, dims: FlowPolicy(cond, 4, dims, FlowConfig(hidden=(64, 64))),
    "gmm": lambda cond, dims: GMMPolicy(cond, 4, dims, GMMConfig(hidden=(64, 64), low_noise_eval=False)),
    "mlp": lambda cond, dims: MLPPolicy(cond, 4, dims, MLPConfig(hidden=(64, 64))),
}


class TinyNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 16, 3, stride=2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(images)).mean((2, 3))


def policy_of(
    head: str,
    obs_horizon: int = 2,
    *,
    cameras: Mapping[str, tuple[int, int]] = SHAPES,
    low_dim: Mapping[str, tuple[int, ...]] = {"pose": (3,)},
    dims: int = 3,
    net: torch.nn.Module | str | None = None,
) -> VisuomotorPolicy:
    """A policy of four actions with ``dims`` numbers each."""
    shape_meta: dict[str, Any] = {camera: {"shape": (*size, 3), "type": "rgb"} for camera, size in cameras.items()}
    shape_meta |= {key: {"shape": shape, "type": "low_dim"} for key, shape in low_dim.items()}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        encoder = MultiImageObsEncoder(
            {"obs": shape_meta}, net or TinyNet(), emb_dim=32, pretrained=False, verbose=False
        )
        made = VisuomotorPolicy(encoder, HEADS[head](obs_horizon * 32, dims), (obs_horizon, 4, dims), clip_actions=True)
    return made.requires_grad_(False).eval()
