"""Behaviour cloning with a mixture of Gaussians, after robomimic's BC-GMM (Mandlekar et al., 2021, arXiv:2108.03298).

One component spans the whole chunk, so that a sampled action sequence does not hop between modes; at an action
horizon of 1 the distribution is robomimic's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cache_pipeline.errors import ConfigError
from cache_pipeline.policies.network import check_hidden, mlp


@dataclass(frozen=True, kw_only=True)
class GMMConfig:
    """Options of the gmm policy."""

    hidden: tuple[int, ...] = (512, 512, 512, 512)
    modes: int = 5
    min_std: float = 1e-4
    low_noise_eval: bool = True
    """Sample around the components' means with a deviation of ``min_std`` when acting."""

    def __post_init__(self) -> None:
        check_hidden(self.hidden)
        if self.modes < 1:
            raise ConfigError(f"modes is {self.modes}; it must be at least 1")
        if self.min_std <= 0:
            raise ConfigError(f"min_std is {self.min_std}; it must be positive")


class GMMPolicy(nn.Module):
    """Predicts a mixture over action chunks. Arguments as in FlowPolicy."""

    def __init__(self, cond_dim: int, action_horizon: int, action_dim: int, config: GMMConfig) -> None:
        super().__init__()
        self._shape = (action_horizon, action_dim)
        self._config = config
        chunk = action_horizon * action_dim
        self.network = mlp(cond_dim, config.hidden, config.modes * (1 + 2 * chunk))

    def loss(self, cond: Tensor, actions: Tensor, mask: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Negative log likelihood per action step. cond (B,P), actions (B,Ta,A), mask (B,Ta); draws nothing."""
        logits, means, scales = self._mixture(cond)
        deviation = (actions.unsqueeze(1) - means) / scales
        log_density = -(0.5 * deviation.square() + scales.log() + 0.5 * math.log(2 * math.pi)).sum(-1)
        weight = mask.to(actions.dtype)
        joint = logits.log_softmax(-1) + (log_density * weight.unsqueeze(1)).sum(-1)
        return -joint.logsumexp(-1).sum() / weight.sum().clamp_min(1)

    def act(self, cond: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A sampled action chunk (B,Ta,A) for ``cond`` (B,P)."""
        logits, means, scales = self._mixture(cond)
        mode = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
        rows = torch.arange(len(cond), device=cond.device)
        spread = self._config.min_std if self._config.low_noise_eval else scales[rows, mode]
        noise = torch.randn((len(cond), *self._shape), generator=generator, device=cond.device, dtype=cond.dtype)
        return means[rows, mode] + spread * noise

    def _mixture(self, cond: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B,M), means and deviations (B,M,Ta,A)."""
        modes, chunk = self._config.modes, math.prod(self._shape)
        logits, means, scales = self.network(cond).split((modes, modes * chunk, modes * chunk), dim=1)
        shape = (-1, modes, *self._shape)
        return logits, means.reshape(shape), F.softplus(scales.reshape(shape)) + self._config.min_std
