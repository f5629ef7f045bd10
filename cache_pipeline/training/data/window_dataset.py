"""Windows of a cache as a map-style dataset, for a training loop of the user's own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.demos.split import Split, absent_demos
from cache_pipeline.demos.windows import WindowSpec
from cache_pipeline.errors import ConfigError, available
from cache_pipeline.training.data.rows import cache_row_numbers, choose_keys, rows_of_cache

logger = logging.getLogger("cache_pipeline")

Sample = tuple[dict[str, NDArray[np.float32]], NDArray[np.float32], NDArray[np.bool_]]
"""(obs, actions, mask), as NumPy arrays."""


class WindowDataset:
    """One sample per step of each demo: ``(obs, actions, mask)``.

    For step t, ``obs`` holds steps t-To+1 … t, where the first step is repeated before the demo begins:
    ``{camera: (To, …), low-dim key: (To, …)}`` in float32. ``actions`` (Ta, A) holds steps t … t+Ta-1, where the last
    action is repeated after the demo ends; ``mask`` (Ta,) is False there. Windows are in the order of demos and steps,
    as ``cp.train`` has them.

    Works in a ``torch.utils.data.DataLoader`` with any number of workers, forked or spawned. A whole mini-batch is read
    at once. Features are read from the cache at each access; low-dim obs and actions are held in memory.

    >>> dataset = WindowDataset("lift.zarr", filter_key="train")           # doctest: +SKIP
    >>> loader = DataLoader(dataset, batch_size=64, shuffle=True)          # doctest: +SKIP

    Args:
        cache: a complete cache, or its path.
        obs_horizon: To.
        action_horizon: Ta.
        cameras: those whose features are given; all by default.
        low_dim_keys: those that are given; all by default.
        filter_key: take this filter key's demos.
        demos: or take these, by their index in ``cache.demos``; by default all demos are taken.
        view: of the features; 0 is the clean one.

    Raises:
        ConfigError: a camera, key, filter key or demo that the cache does not have.
        CacheError: there is no such cache, or no such view.
    """

    def __init__(
        self,
        cache: FeatureCache | str | Path,
        *,
        obs_horizon: int = 2,
        action_horizon: int = 8,
        cameras: Sequence[str] | None = None,
        low_dim_keys: Sequence[str] | None = None,
        filter_key: str | None = None,
        demos: Sequence[int] | None = None,
        view: int = 0,
    ) -> None:
        self.cache = cache if isinstance(cache, FeatureCache) else FeatureCache(cache)
        self.cameras = choose_keys(cameras, tuple(self.cache.cameras), "camera")
        self.low_dim_keys = choose_keys(low_dim_keys, tuple(self.cache.low_dim), "low-dim key")
        self.demos = _chosen_demos(self.cache, filter_key, demos)
        self.view = view
        for camera in self.cameras:
            self.cache.features(camera, slice(0, 0), view)  # raises if there is no such view
        split = Split(self.demos, (), "")
        rows = rows_of_cache(self.cache, split, self.low_dim_keys)
        windows = rows.windows(WindowSpec(obs_horizon, action_horizon))
        assert windows is not None
        self._rows, self._windows, self._numbers = rows, windows, cache_row_numbers(self.cache, split)

    def __len__(self) -> int:
        return len(self._windows.demo)

    def __getitem__(self, window: int) -> Sample:
        return self.__getitems__([window])[0]

    def __getitems__(self, windows: Sequence[int]) -> list[Sample]:
        """The samples of a mini-batch, read at once; called by ``DataLoader``."""
        obs, actions, mask = self.batch(windows)
        return [({key: values[i] for key, values in obs.items()}, actions[i], mask[i]) for i in range(len(actions))]

    def batch(self, windows: Sequence[int] | NDArray[np.integer]) -> Sample:
        """The samples of a mini-batch stacked: obs (B, To, …), actions (B, Ta, A), mask (B, Ta)."""
        chosen = np.asarray(windows, np.int64)
        rows = self._windows.obs_rows[chosen]  # (B, To)
        obs: dict[str, NDArray[Any]] = {}
        for camera in self.cameras:
            obs[camera] = self.cache.features(camera, self._numbers[rows], self.view).astype(np.float32, copy=False)
        for key in self.low_dim_keys:
            obs[key] = self._rows.low_dim[key][rows]
        return obs, self._rows.actions[self._windows.action_rows[chosen]], self._windows.action_mask[chosen]


def _chosen_demos(cache: FeatureCache, filter_key: str | None, demos: Sequence[int] | None) -> tuple[int, ...]:
    if filter_key is not None and demos is not None:
        raise ConfigError("filter_key and demos both choose demos; give one of them")
    if demos is not None:
        chosen = tuple(int(number) for number in demos)
        wrong = [number for number in chosen if not 0 <= number < len(cache.demos)]
        if wrong:
            last = len(cache.demos) - 1
            raise ConfigError(f"{cache.path} has no demo number {wrong[0]}; its demos are numbered 0 to {last}")
    elif filter_key is not None:
        chosen, absent = tuple(sorted(cache.masks.get(filter_key, ()))), cache.absent.get(filter_key, ())
        if not chosen:
            there = available([key for key, members in cache.masks.items() if members], filter_key)
            raise ConfigError(f"{cache.path} has no demos of a filter key {filter_key!r}; {there}")
        if absent:
            logger.warning("%s", absent_demos(filter_key, absent, len(chosen) + len(absent)))
    else:
        chosen = tuple(range(len(cache.demos)))
    if not chosen:
        raise ConfigError("demos is empty; name at least one, or leave it out for all")
    return chosen
