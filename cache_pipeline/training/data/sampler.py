"""Samples the windows and views of each step, as a pure function of (seed, step).

The order ``full`` shuffles all windows of an epoch. The order ``block`` is for caches much larger than memory: it
shuffles blocks of consecutive windows, groups them into pools, and shuffles windows within each pool. Then one pool at
a time must be in memory. Epochs follow each other without a gap, so that every batch is full.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.demos.windows import epoch_order

VIEW_STREAM, BLOCK_STREAM = 1, 2


class Plan(NamedTuple):
    """The samples of one step.

    Attributes:
        step: counted from 0.
        windows: (B,) window numbers.
        views: (B,) the view of each window, 0 the clean one.
        pool: number of the pool that the first window belongs to, counted over all epochs.
    """

    step: int
    windows: NDArray[np.int64]
    views: NDArray[np.int64]
    pool: int


@dataclass(frozen=True, kw_only=True)
class BlockOrder:
    """Sizes of the block order, in windows."""

    block: int = 512
    pool: int = 32768

    def __post_init__(self) -> None:
        assert 0 < self.block <= self.pool


class _Epoch(NamedTuple):
    order: NDArray[np.int64]
    views: NDArray[np.int64]


class Sampler:
    """Plans the steps of a run.

    Args:
        windows: number of windows in the train split.
        batch_size: B, over all processes.
        seed: of the order and of the views.
        views: number of views to draw from; 1 means the clean one alone. In block order one view is drawn per block.
        blocks: sizes of the block order; None for a full shuffle.
    """

    def __init__(
        self, windows: int, batch_size: int, seed: int, *, views: int = 1, blocks: BlockOrder | None = None
    ) -> None:
        assert windows > 0
        self.batch_size = batch_size
        self._n, self._seed, self._views, self._blocks = windows, seed, views, blocks
        self._epochs: dict[int, _Epoch] = {}

    def plan(self, step: int) -> Plan:
        """Returns the samples of ``step``."""
        first = step * self.batch_size
        windows, views = [], []
        at, stop = first, first + self.batch_size
        while at < stop:
            epoch, offset = divmod(at, self._n)
            take = slice(offset, min(self._n, offset + stop - at))
            drawn = self._epoch(epoch)
            windows.append(drawn.order[take])
            views.append(drawn.views[take])
            at += take.stop - take.start
        epoch, offset = divmod(first, self._n)
        pool = epoch * -(-self._n // self._pool_windows) + offset // self._pool_windows
        return Plan(step, np.concatenate(windows), np.concatenate(views), pool)

    def plans(self, start: int, stop: int) -> Iterator[Plan]:
        """Yields the plans of the steps ``start`` to ``stop``."""
        return map(self.plan, range(start, stop))

    @property
    def _pool_windows(self) -> int:
        return self._n if self._blocks is None else self._blocks.pool // self._blocks.block * self._blocks.block

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            self._epochs = {number: drawn for number, drawn in self._epochs.items() if number == epoch - 1}
            self._epochs[epoch] = self._draw(epoch)
        return self._epochs[epoch]

    def _draw(self, epoch: int) -> _Epoch:
        if self._blocks is None:
            order = epoch_order(self._n, self._seed, epoch)
            return _Epoch(order, self._draw_views(epoch, order))
        block = self._blocks.block
        rng = _generator(self._seed, epoch, BLOCK_STREAM)
        starts = rng.permutation(-(-self._n // block)) * block
        order = np.concatenate([np.arange(start, min(self._n, start + block)) for start in starts])
        for start in range(0, self._n, self._pool_windows):
            rng.shuffle(order[start : start + self._pool_windows])
        return _Epoch(order, self._draw_views(epoch, order // block))

    def _draw_views(self, epoch: int, groups: NDArray[np.int64]) -> NDArray[np.int64]:
        """Draws one view for each of ``groups``, numbered from 0; equal groups get equal views."""
        if self._views == 1:
            return np.zeros(len(groups), np.int64)
        drawn = _generator(self._seed, epoch, VIEW_STREAM).integers(self._views, size=int(groups.max()) + 1)
        return drawn[groups]


def _generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, stream])))
