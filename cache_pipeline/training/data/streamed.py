"""Streamed source for a cache larger than memory: a thread prefetches the next pool of rows during training.

At most two pools are in memory. In full order the rows of a pool are spread over the cache, so a chunk is read up to
once per pool. In block order a pool is a random draw of blocks, and every chunk is read about once per
epoch.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_pipeline.policies.batch import Batch
from cache_pipeline.training.data.sampler import BlockOrder, Plan
from cache_pipeline.training.data.source import CachedRows, SplitRows, Splits, take_rows, view_rows

# Two pools, and the decoded shards from which one of them is assembled.
POOLS_IN_MEMORY = 3
BLOCK_WINDOWS = 256


class _Pool(NamedTuple):
    """Consecutive plans with their features; ``places`` (B,To) index the features."""

    plans: list[Plan]
    places: list[Tensor]
    features: dict[str, Tensor]


class StreamedSource:
    """Reads features pool by pool. Arguments as in ResidentSource.

    Args:
        pool_rows: largest number of rows of a pool.
    """

    name = "streamed"

    def __init__(self, rows: CachedRows, splits: Splits, device: torch.device, *, pool_rows: int) -> None:
        self._cache, self._cameras, self._numbers, self._views = rows
        self._splits, self._pool_rows, self._device = splits, pool_rows, device

    def batches(self, plans: Iterable[Plan], *, valid: bool = False) -> Generator[Batch, None, None]:
        split = self._splits[int(valid)]
        assert split is not None
        groups = self._group(plans, split)
        with ThreadPoolExecutor(1, thread_name_prefix="stream") as reader:
            coming = reader.submit(self._read_next, groups, split)
            while (pool := coming.result()) is not None:
                coming = reader.submit(self._read_next, groups, split)
                for plan, places in zip(pool.plans, pool.places, strict=True):
                    features = {camera: take_rows(values, places).float() for camera, values in pool.features.items()}
                    yield split.batch(plan, features)
                del pool

    def features_of(self, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        return {camera: torch.from_numpy(self._cache.features(camera, self._numbers[rows])) for camera in self._cameras}

    def _group(self, plans: Iterable[Plan], split: SplitRows) -> Iterator[list[Plan]]:
        """Groups consecutive plans of one pool; splits where their rows would exceed the pool's size."""
        group: list[Plan] = []
        seen, count = np.zeros(self._views * len(self._numbers), bool), 0
        for plan in plans:
            rows = np.unique(self._places(plan, split))
            fresh = rows[~seen[rows]]
            if group and (plan.pool != group[-1].pool or count + len(fresh) > self._pool_rows):
                yield group
                group, count, fresh = [], 0, rows
                seen[:] = False
            group.append(plan)
            seen[fresh] = True
            count += len(fresh)
        if group:
            yield group

    def _read_next(self, groups: Iterator[list[Plan]], split: SplitRows) -> _Pool | None:
        plans = next(groups, None)
        if plans is None:
            return None
        wanted = [self._places(plan, split) for plan in plans]
        held = np.unique(np.concatenate([places.ravel() for places in wanted]))
        features = {camera: self._read_camera(camera, held).to(self._device) for camera in self._cameras}
        places = [torch.from_numpy(np.searchsorted(held, rows)).to(self._device) for rows in wanted]
        return _Pool(plans, places, features)

    def _read_camera(self, camera: str, held: NDArray[np.int64]) -> Tensor:
        view, row = np.divmod(held, len(self._numbers))
        parts = [self._cache.features(camera, self._numbers[row[view == v]], int(v)) for v in np.unique(view)]
        return torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))

    def _places(self, plan: Plan, split: SplitRows) -> NDArray[np.int64]:
        return view_rows(plan, split.obs_rows, len(self._numbers))


def pool_rows(budget: int, row_bytes: int) -> int:
    """Returns the rows of a pool such that all memory in use stays within ``budget`` bytes."""
    return max(1, budget // (POOLS_IN_MEMORY * row_bytes))


def block_order(rows: int, windows: int) -> BlockOrder:
    """Returns the block sizes for pools of ``rows`` rows, with space for the batch that extends into the next pool."""
    pool = max(1, int(min(windows, 0.9 * rows)))
    return BlockOrder(block=max(1, min(BLOCK_WINDOWS, pool // 4)), pool=pool)
