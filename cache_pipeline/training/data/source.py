"""Shared code of all sources: turns the plan of a step into its batch, of which a source gives the features."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from itertools import groupby
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.demos.windows import Windows
from cache_pipeline.policies.batch import Batch
from cache_pipeline.training.data.rows import RunRows
from cache_pipeline.training.data.sampler import Plan


class Source(Protocol):
    """Turns plans into batches, in their order."""

    name: str

    def batches(self, plans: Iterable[Plan], *, valid: bool = False) -> Generator[Batch, None, None]:
        """The batch of each plan; window numbers are those of the train split, or of the held-out one."""
        ...

    def features_of(self, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        """Returns clean features at the cut for packed rows, ``{camera: (n, …)}`` on the CPU, for statistics."""
        ...


class CachedRows(NamedTuple):
    """The rows of a cache that a run reads.

    Attributes:
        cache: the cache.
        cameras: camera names.
        numbers: (N,) the cache's row of each packed row.
        views: number of views to read.
    """

    cache: FeatureCache
    cameras: tuple[str, ...]
    numbers: NDArray[np.int64]
    views: int


Splits = tuple["SplitRows", "SplitRows | None"]
"""Windows of the train split and of the held-out split."""


class SplitRows:
    """Windows, low-dim obs and actions of one split, resident on the device.

    Args:
        windows: of the split, in packed rows.
        rows: of the run.
    """

    def __init__(self, windows: Windows, rows: RunRows, device: torch.device) -> None:
        self.obs_rows = windows.obs_rows
        self._obs_rows = torch.from_numpy(windows.obs_rows).to(device)
        self._action_rows = torch.from_numpy(windows.action_rows).to(device)
        self._mask = torch.from_numpy(windows.action_mask).to(device)
        self._actions = torch.from_numpy(rows.actions).to(device)
        self._low_dim = {key: torch.from_numpy(values).to(device) for key, values in rows.low_dim.items()}
        self._device = device

    def __len__(self) -> int:
        return len(self.obs_rows)

    def batch(self, plan: Plan, features: dict[str, Tensor]) -> Batch:
        """Returns the batch of a plan: ``features``, and the low-dim obs, actions and mask of its windows."""
        windows = torch.from_numpy(plan.windows).to(self._device, non_blocking=True)
        rows = self._obs_rows.index_select(0, windows)
        low_dim = {key: take_rows(values, rows) for key, values in self._low_dim.items()}
        actions = take_rows(self._actions, self._action_rows.index_select(0, windows))
        return Batch({**features, **low_dim}, actions, self._mask.index_select(0, windows))


def take_rows(values: Tensor, rows: Tensor) -> Tensor:
    """``values`` (N,…) at ``rows`` (B,T): (B,T,…)."""
    return values.index_select(0, rows.flatten()).view(*rows.shape, *values.shape[1:])


def view_rows(plan: Plan, obs_rows: NDArray[np.int64], n_rows: int) -> NDArray[np.int64]:
    """(B,To) places of a batch in an array that holds the ``n_rows`` rows of one view after those of another."""
    return obs_rows[plan.windows] + (plan.views * n_rows)[:, None]


IN_WORDS = {
    "resident": "cached features held in memory",
    "streamed": "cached features read from disk",
    "live": "frames encoded at every step",
}


def source_in_words(names: str) -> str:
    """Describes the sources of a run's phases, such as ``resident+live``, in words.

    >>> source_in_words("live+live")
    'frames encoded at every step'
    """
    return ", then ".join(IN_WORDS.get(name, name) for name, _ in groupby(names.split("+")))
