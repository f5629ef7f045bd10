"""Keeps the last obs of an episode for the policy."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.errors import ConfigError, available


class ObsHistory:
    """The last ``horizon`` obs; at the start of an episode the first obs is repeated, as in robomimic's FrameStack."""

    def __init__(self, keys: Iterable[str], horizon: int) -> None:
        assert horizon >= 1
        self._keys = tuple(keys)
        self._seen: deque[dict[str, NDArray]] = deque(maxlen=horizon)

    def start(self, obs: Mapping[str, NDArray]) -> None:
        """Clears the history and fills it with the first obs of an episode."""
        missing = [key for key in self._keys if key not in obs]
        if missing:
            raise ConfigError(f"the environment has no obs {missing[0]!r}; {available(obs, missing[0])}")
        self._seen.clear()
        for _ in range(self._seen.maxlen or 0):
            self.add(obs)

    def add(self, obs: Mapping[str, NDArray]) -> None:
        """Adds the newest obs and drops the oldest."""
        self._seen.append({key: obs[key] for key in self._keys})

    def stack(self) -> dict[str, NDArray]:
        """Returns key → (1, To, …), oldest obs first."""
        return {key: np.stack([obs[key] for obs in self._seen])[None] for key in self._keys}
