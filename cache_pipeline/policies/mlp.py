"""Behaviour cloning by regression on a chunk of actions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cache_pipeline.errors import ConfigError, available
from cache_pipeline.policies.batch import masked_mean
from cache_pipeline.policies.draws import Draws
from cache_pipeline.policies.network import check_hidden, mlp


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """Options of the mlp policy."""

    hidden: tuple[int, ...] = (512, 512, 512, 512)
    loss: Literal["mse", "l1"] = "mse"

    def __post_init__(self) -> None:
        check_hidden(self.hidden)
        if self.loss not in ("mse", "l1"):
            raise ConfigError(f"loss {self.loss!r} is unknown; {available(('mse', 'l1'), self.loss)}")


class MLPPolicy(nn.Module):
    """Predicts the action chunk from the condition. Arguments as in FlowPolicy."""

    def __init__(self, cond_dim: int, action_horizon: int, action_dim: int, config: MLPConfig) -> None:
        super().__init__()
        self._shape = (action_horizon, action_dim)
        self._squared = config.loss == "mse"
        self.network = mlp(cond_dim, config.hidden, action_horizon * action_dim)

    def loss(self, cond: Tensor, actions: Tensor, mask: Tensor, generator: Draws = None) -> Tensor:
        """Computes the mean squared or absolute error. cond (B,P), actions (B,Ta,A), mask (B,Ta)."""
        error = self.act(cond) - actions
        return masked_mean(error.square() if self._squared else error.abs(), mask)

    def act(self, cond: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Predicts the action chunk (B,Ta,A) for ``cond`` (B,P)."""
        return self.network(cond).view(-1, *self._shape)


HEAD = (MLPPolicy, MLPConfig)
