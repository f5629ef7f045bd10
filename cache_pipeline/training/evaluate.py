"""Measures the held-out action error, in the units of the dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_pipeline.training.data.sampler import Plan
from cache_pipeline.training.data.source import Source

BATCH = 256


class ActionError(NamedTuple):
    """Mean squared action errors over held-out windows; padded action steps do not count.

    Attributes:
        mse: mean over all action dimensions.
        mse_per_dim: (A,) error of each dimension.
        mean_action_mse: error of always predicting the mean action of the train split, over the same windows.
    """

    mse: float
    mse_per_dim: tuple[float, ...]
    mean_action_mse: float


@torch.no_grad()
def evaluate(
    predict: Callable[[dict[str, Tensor], torch.Generator], Tensor],
    source: Source,
    windows: int,
    mean_action: NDArray[np.float32],
    *,
    device: torch.device,
    most: int = 4096,
    seed: int = 0,
) -> ActionError:
    """Measures the actions that ``predict`` gives for the obs of the held-out split of ``source``.

    Args:
        windows: number of held-out windows; above ``most`` an evenly spaced subset is measured.
        mean_action: (A,) mean action of the train split.
        seed: seed of the policy's noise, the same at every measurement.
    """
    generator = torch.Generator(device).manual_seed(seed)
    mean = torch.from_numpy(mean_action).to(device)
    error = torch.zeros(2, len(mean), dtype=torch.float64, device=device)
    count = torch.zeros((), dtype=torch.float64, device=device)
    for batch in source.batches(_plans(windows, most), valid=True):
        weight = batch.mask.unsqueeze(-1)
        predicted = predict(batch.obs, generator)
        for row, guess in enumerate((predicted, mean)):
            error[row] += ((guess - batch.actions).square() * weight).sum((0, 1), dtype=torch.float64)
        count += batch.mask.sum()
    ours, baseline = _per_dim(error[0], count), _per_dim(error[1], count)
    return ActionError(
        mse=float(np.mean(ours)),
        mse_per_dim=ours,
        mean_action_mse=float(np.mean(baseline)),
    )


def _plans(windows: int, most: int) -> Iterator[Plan]:
    chosen = np.linspace(0, windows - 1, min(windows, most)).round().astype(np.int64)
    for step, start in enumerate(range(0, len(chosen), BATCH)):
        part = chosen[start : start + BATCH]
        yield Plan(step, part, np.zeros(len(part), np.int64), 0)


def _per_dim(error: Tensor, count: Tensor) -> tuple[float, ...]:
    return tuple((error / count).tolist())
