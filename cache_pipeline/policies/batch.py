"""Batches of windows, and the masked mean of a loss."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Windows of a dataset, in dataset units.

    Attributes:
        obs: ``{camera: features at the cut (B,To,D) or (B,To,D,h,w), or frames uint8 (B,To,H,W,3)}`` and
            ``{low-dim key: (B,To,…)}``.
        actions: (B,Ta,A).
        mask: (B,Ta), True if the action step is inside its demo.
    """

    obs: dict[str, Tensor]
    actions: Tensor
    mask: Tensor

    def select(self, rows: slice) -> Batch:
        """Returns a batch of the windows ``rows``."""
        obs = {key: values[rows] for key, values in self.obs.items()}
        return Batch(obs, self.actions[rows], self.mask[rows])


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Averages ``values`` (B,Ta,A) over dimensions and over the action steps where ``mask`` (B,Ta) is True."""
    weight = mask.to(values.dtype)
    return (values * weight.unsqueeze(-1)).sum() / (weight.sum().clamp_min(1) * values.shape[-1])
