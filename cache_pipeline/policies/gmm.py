"""Behaviour cloning with a mixture of Gaussians, after robomimic's BC-GMM (Mandlekar et al., 2021, arXiv:2108.03298).

A component spans the whole chunk, so a sampled action sequence does not switch between modes. Unlike in robomimic, no
tanh limits the means to [-1, 1], because normalised actions can exceed 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cache_pipeline.errors import ConfigError
from cache_pipeline.policies.draws import Draws
from cache_pipeline.policies.network import check_hidden, mlp


@dataclass(frozen=True, kw_only=True)
class GMMConfig:
    """Options of the gmm policy."""

    hidden: tuple[int, ...] = (512, 512, 512, 512)
    modes: int = 5
    min_std: float = 1e-4
    low_noise_eval: bool = True
    """When acting, sample around the means with a standard deviation of ``min_std``."""

    def __post_init__(self) -> None:
        check_hidden(self.hidden)
        if self.modes < 1:
            raise ConfigError(f"modes is {self.modes}; it must be at least 1")
        if self.min_std <= 0:
            raise ConfigError(f"min_std is {self.min_std}; it must be positive")


class GMMPolicy(nn.Module):
    """Predicts a mixture of Gaussians over action chunks. Arguments as in FlowPolicy."""

    def __init__(self, cond_dim: int, action_horizon: int, action_dim: int, config: GMMConfig) -> None:
        super().__init__()
        self._shape = (action_horizon, action_dim)
        self._config = config
        chunk = action_horizon * action_dim
        self.noise_shape = (config.modes + chunk,)
        self.network = mlp(cond_dim, config.hidden, config.modes * (1 + 2 * chunk))

    def loss(self, cond: Tensor, actions: Tensor, mask: Tensor, generator: Draws = None) -> Tensor:
        """Computes the negative log likelihood per action step. cond (B,P), actions (B,Ta,A), mask (B,Ta).

        Uses no random numbers.
        """
        logits, means, scales = self._mixture(cond)
        deviation = (actions.unsqueeze(1) - means) / scales
        log_density = -(0.5 * deviation.square() + scales.log() + 0.5 * math.log(2 * math.pi)).sum(-1)
        weight = mask.to(actions.dtype)
        joint = logits.log_softmax(-1) + (log_density * weight.unsqueeze(1)).sum(-1)
        return -joint.logsumexp(-1).sum() / weight.sum().clamp_min(1)

    def act(self, cond: Tensor, generator: torch.Generator | None = None, *, noise: Tensor | None = None) -> Tensor:
        """Samples an action chunk (B,Ta,A) for ``cond`` (B,P).

        Args:
            noise: (B, M + Ta·A) standard normal values instead of drawn ones: M values choose the component, the others
                are the deviation from its means. Zeros give the means of the most likely component.
        """
        logits, means, scales = self._mixture(cond)
        if noise is None:
            mode = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
            step = torch.randn((len(cond), *self._shape), generator=generator, device=cond.device, dtype=cond.dtype)
        else:
            choice = noise[:, : self._config.modes]
            mode = (logits.log_softmax(-1) + _gumbel(choice)).argmax(-1)
            step = noise[:, self._config.modes :].reshape(-1, *self._shape)
        rows = torch.arange(cond.shape[0], device=cond.device)
        spread = self._config.min_std if self._config.low_noise_eval else scales[rows, mode]
        return means[rows, mode] + spread * step

    def _mixture(self, cond: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Computes logits (B,M), means and standard deviations (B,M,Ta,A)."""
        modes, chunk = self._config.modes, math.prod(self._shape)
        logits, means, scales = self.network(cond).split((modes, modes * chunk, modes * chunk), dim=1)
        shape = (-1, modes, *self._shape)
        return logits, means.reshape(shape), F.softplus(scales.reshape(shape)) + self._config.min_std


def _gumbel(normal: Tensor) -> Tensor:
    """Converts standard normal to standard Gumbel values. The argmax of logits plus these samples their softmax."""
    uniform = (0.5 * (1 + torch.erf(normal / math.sqrt(2)))).clamp(1e-7, 1 - 1e-7)
    return -torch.log(-torch.log(uniform))


HEAD = (GMMPolicy, GMMConfig)
