"""Small policies with random weights for the environment of walk.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cache_pipeline.encoders.obs_encoder import MultiImageObsEncoder
from cache_pipeline.policies.flow import FlowConfig, FlowPolicy
from cache_pipeline.policies.gmm import GMMConfig, GMMPolicy
from cache_pipeline.policies.mlp import MLPConfig, MLPPolicy
from cache_pipeline.policies.visuomotor import VisuomotorPolicy

SIZE = 8
SHAPES = {"front_image": (SIZE, SIZE), "wrist_image": (SIZE, SIZE)}
HEADS: dict[str, Callable[[int], torch.nn.Module]] = {
    "flow": lambda cond: FlowPolicy(cond, 4, 3, FlowConfig(hidden=(64, 64))),
    "gmm": lambda cond: GMMPolicy(cond, 4, 3, GMMConfig(hidden=(64, 64), low_noise_eval=False)),
    "mlp": lambda cond: MLPPolicy(cond, 4, 3, MLPConfig(hidden=(64, 64))),
}


class TinyNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 16, 3, stride=2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(images)).mean((2, 3))


def policy_of(head: str, obs_horizon: int = 2) -> VisuomotorPolicy:
    shape_meta: dict[str, Any] = {camera: {"shape": (SIZE, SIZE, 3), "type": "rgb"} for camera in SHAPES}
    shape_meta["pose"] = {"shape": (3,), "type": "low_dim"}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        encoder = MultiImageObsEncoder({"obs": shape_meta}, TinyNet(), emb_dim=32, verbose=False)
        made = VisuomotorPolicy(encoder, HEADS[head](obs_horizon * 32), (obs_horizon, 4, 3), clip_actions=True)
    return made.requires_grad_(False).eval()
