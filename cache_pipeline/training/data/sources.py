"""Chooses and opens the sources of a run's features: source, number of views and order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch

from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.encoders.frozen import FrozenEncoder
from cache_pipeline.errors import CheckpointError
from cache_pipeline.files import typed
from cache_pipeline.training.config import Order, SourceName
from cache_pipeline.training.data.live import DemoFrames, LiveSource
from cache_pipeline.training.data.memory import fits, host_budget, memory_budget
from cache_pipeline.training.data.resident import ResidentSource
from cache_pipeline.training.data.rows import cache_row_numbers
from cache_pipeline.training.data.run_data import RunData
from cache_pipeline.training.data.sampler import BlockOrder
from cache_pipeline.training.data.source import CachedRows, Source, Splits
from cache_pipeline.training.data.streamed import StreamedSource, block_order, pool_rows
from cache_pipeline.training.update.distributed import current_ranks

logger = logging.getLogger("cache_pipeline")

DEFAULT_POOL_BYTES = 1 << 30
FULL_ORDER_POOLS = 64  # most reads of one chunk per epoch


class SourcePlan(NamedTuple):
    """The source, the number of views and the order of a run: chosen once and saved with the run."""

    source: SourceName
    views: int
    blocks: BlockOrder | None

    @property
    def order(self) -> dict[str, Any]:
        """The order of samples for run.json."""
        return {"views": self.views, "blocks": None if self.blocks is None else asdict(self.blocks)}

    def with_order(self, order: dict[str, Any]) -> SourcePlan:
        """Returns the same source with the order of the resumed run, whatever memory is free now.

        Raises:
            CheckpointError: ``order`` is not the value of ``order``.
        """
        try:
            views, blocks = typed(order["views"], int), typed(order["blocks"], BlockOrder | None)
            if views < 1:
                raise ValueError(f"{views} views")
        except (KeyError, ValueError, AssertionError) as error:
            raise CheckpointError(f"run.json is damaged: its order of samples cannot be read ({error})") from error
        return SourcePlan(self.source, views, blocks)


def plan_source(
    data: RunData,
    windows: int,
    *,
    source: SourceName,
    order: Order,
    views: int,
    max_memory: int | None,
    device: torch.device,
) -> SourcePlan:
    """Chooses the source by size, and the order for it.

    Streaming uses a full shuffle while an epoch takes few pools; its samples then equal those of other sources. With
    many pools a full shuffle would read most of the cache once per pool; pools of blocks then mix enough demos.
    """
    if data.cache is None or source == "live":
        return SourcePlan("live", views, None)
    row_bytes = _feature_bytes(data.cache, tuple(data.cameras))
    # Free memory differs between processes, but all must use the same samples.
    ranks, needed = current_ranks(), len(data.rows.actions) * row_bytes * views
    too_large = ranks.any(not fits(needed, memory_budget(device, max_memory)))
    chosen: SourceName = source if source != "auto" else ("streamed" if too_large else "resident")
    rows = ranks.number_of_first(pool_rows(_pool_budget(device, max_memory), row_bytes))
    full = chosen != "streamed" or windows <= FULL_ORDER_POOLS * rows
    if order == "full" or (order == "auto" and full):
        return SourcePlan(chosen, views, None)
    return SourcePlan(chosen, views, block_order(rows, windows))


def _pool_budget(device: torch.device, max_memory: int | None) -> int:
    """Returns the byte budget of all pools; pools are in host memory on every device."""
    budget = max_memory if max_memory is not None else min(DEFAULT_POOL_BYTES, memory_budget(device, None))
    return budget if device.type == "cpu" else min(budget, host_budget())


def _feature_bytes(cache: FeatureCache, cameras: Sequence[str]) -> int:
    itemsize = np.dtype(cache.manifest.dtype).itemsize
    return sum(int(np.prod(cache.cameras[camera].feature_shape)) for camera in cameras) * itemsize


class Sources:
    """Opens the sources of a run, all over the same windows; one is open at a time.

    Args:
        data: what the run trains on.
        splits: windows of the train and of the held-out split.
        plan: the source to begin with.
        frames: opens the dataset with the frames of the same demos.
        encoders: makes the frozen encoder of each camera, for statistics and comparisons.
        max_memory: bytes that features or frames may take; None for half of what is free.

    Attributes:
        current: the source that is open.
    """

    def __init__(
        self,
        data: RunData,
        splits: Splits,
        plan: SourcePlan,
        *,
        frames: Callable[[], RunData],
        encoders: Callable[[], Mapping[str, FrozenEncoder]],
        max_memory: int | None,
        device: torch.device,
    ) -> None:
        self.plan, self._data, self._splits = plan, data, splits
        self._frames, self._encoders = frames, encoders
        self._max_memory, self._device = max_memory, device
        self.current: Source | None = None

    def open(self, *, live: bool) -> Source:
        """Opens the live source, or the plan's cached one, and drops the source that was open."""
        if self.current is None or (self.current.name == "live") is not live:
            self.current = None
            self.current = self.open_live(self._max_memory) if live else self._open_cached()
        return self.current

    def open_live(self, max_memory: int | None) -> LiveSource:
        """Opens another live source, whose frames take at most ``max_memory`` bytes."""
        data = self._frames()
        assert data.dataset is not None
        demos = (*data.split.train, *data.split.valid)
        return LiveSource(
            DemoFrames(data.dataset, demos, np.cumsum(data.rows.lengths) - data.rows.lengths),
            tuple(data.cameras),
            encoders=self._encoders,
            splits=self._splits,
            budget=memory_budget(self._device, max_memory),
            device=self._device,
        )

    def _open_cached(self) -> Source:
        cache, cameras, plan = self._data.cache, tuple(self._data.cameras), self.plan
        assert cache is not None
        rows = CachedRows(cache, cameras, cache_row_numbers(cache, self._data.split), plan.views)
        if plan.source == "resident":
            return ResidentSource(rows, self._splits, self._device)
        pool = pool_rows(_pool_budget(self._device, self._max_memory), _feature_bytes(cache, cameras))
        order = "all windows" if plan.blocks is None else f"blocks of {plan.blocks.block} windows"
        logger.info("streaming: %s shuffled, read ahead in pools of at most %d rows", order, pool)
        return StreamedSource(rows, self._splits, self._device, pool_rows=pool)
