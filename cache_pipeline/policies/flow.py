"""Flow-matching behaviour cloning over a chunk of actions.

Lipman et al., Flow Matching for Generative Modeling, 2023 (arXiv:2210.02747); as a policy: Park, Li and Levine, Flow
Q-Learning, 2025 (arXiv:2502.02538), whose behaviour-cloning flow has the same network width, depth and Euler steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cache_pipeline.errors import ConfigError
from cache_pipeline.policies.batch import masked_mean
from cache_pipeline.policies.draws import Draws, normal, uniform
from cache_pipeline.policies.network import check_hidden, mlp


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Options of the flow policy."""

    hidden: tuple[int, ...] = (512, 512, 512, 512)
    """Widths of the hidden layers of the velocity network."""
    flow_steps: int = 10
    """Euler steps from noise to actions."""
    time_features: int = 32
    """Number of sinusoids that encode the time."""

    def __post_init__(self) -> None:
        check_hidden(self.hidden)
        if self.flow_steps < 1:
            raise ConfigError(f"flow_steps is {self.flow_steps}; it must be at least 1")
        if self.time_features < 2 or self.time_features % 2:
            raise ConfigError(f"time_features is {self.time_features}; it must be even and positive")


class FlowPolicy(nn.Module):
    """Predicts the velocity from Gaussian noise x0 to an action chunk x1 along x_t = (1-t) x0 + t x1.

    Args:
        cond_dim: P, width of the condition.
        action_horizon, action_dim: Ta, A.
    """

    frequencies: Tensor

    def __init__(self, cond_dim: int, action_horizon: int, action_dim: int, config: FlowConfig) -> None:
        super().__init__()
        self._shape = self.noise_shape = (action_horizon, action_dim)
        self._steps = config.flow_steps
        chunk = action_horizon * action_dim
        self.velocity = mlp(cond_dim + chunk + config.time_features, config.hidden, chunk)
        octaves = torch.linspace(0, math.log(1000.0), config.time_features // 2)
        self.register_buffer("frequencies", octaves.exp(), persistent=False)

    def loss(self, cond: Tensor, actions: Tensor, mask: Tensor, generator: Draws = None) -> Tensor:
        """Computes the MSE of the velocity at a random time. cond (B,P), actions (B,Ta,A), mask (B,Ta)."""
        noise = normal(tuple(actions.shape), generator, actions.device, actions.dtype)
        time = uniform((len(actions),), generator, actions.device, actions.dtype)
        between = torch.lerp(noise, actions, time[:, None, None])
        error = self._velocity(cond, between, time) - (actions - noise)
        return masked_mean(error.square(), mask)

    def act(self, cond: Tensor, generator: torch.Generator | None = None, *, noise: Tensor | None = None) -> Tensor:
        """Samples an action chunk (B,Ta,A) for ``cond`` (B,P), from ``noise`` (B,Ta,A) if given."""
        chunk = noise
        if chunk is None:
            chunk = torch.randn((len(cond), *self._shape), generator=generator, device=cond.device, dtype=cond.dtype)
        for step in range(self._steps):
            time = torch.full((cond.shape[0],), step / self._steps, device=cond.device, dtype=cond.dtype)
            chunk = chunk + self._velocity(cond, chunk, time) / self._steps
        return chunk

    def _velocity(self, cond: Tensor, chunk: Tensor, time: Tensor) -> Tensor:
        phase = time[:, None] * self.frequencies
        moment = torch.cat((chunk.flatten(1), phase.sin(), phase.cos()), dim=1)
        return self.velocity(torch.cat((cond, moment.to(cond.dtype)), dim=1)).view(-1, *self._shape)


HEAD = (FlowPolicy, FlowConfig)
