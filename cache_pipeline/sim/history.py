"""Keeps the last obs of an episode for the policy."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.errors import ConfigError, available


class Moment:
    """The obs of one step.

    Attributes:
        obs: key → (H, W, 3) or (d,).
        features: camera → the feature of its frame, once it was encoded.
    """

    def __init__(self, obs: dict[str, NDArray]) -> None:
        self.obs = obs
        self.features: dict[str, Any] = {}


class ObsHistory:
    """The last ``horizon`` obs; at the start of an episode the first obs is repeated, as in robomimic's FrameStack.

    Attributes:
        moments: the obs, oldest first; a repeated obs is one object.
    """

    def __init__(self, keys: Iterable[str], horizon: int) -> None:
        assert horizon >= 1
        self._keys = tuple(keys)
        self._horizon = horizon
        self.moments: deque[Moment] = deque(maxlen=horizon)

    def start(self, obs: Mapping[str, NDArray]) -> None:
        """Clears the history and fills it with the first obs of an episode."""
        self.moments.extend([self._moment(obs)] * self._horizon)

    def add(self, obs: Mapping[str, NDArray]) -> None:
        """Adds the newest obs and drops the oldest."""
        self.moments.append(self._moment(obs))

    def stack(self) -> dict[str, NDArray]:
        """Returns key → (To, …), oldest obs first."""
        return {key: np.stack([moment.obs[key] for moment in self.moments]) for key in self._keys}

    def _moment(self, obs: Mapping[str, NDArray]) -> Moment:
        return Moment(chosen(obs, self._keys))


def chosen(obs: Mapping[str, NDArray], keys: Iterable[str]) -> dict[str, NDArray]:
    """Returns copies of the obs of ``keys``, since an environment may reuse its arrays.

    Raises:
        ConfigError: a key is missing.
    """
    missing = [key for key in keys if key not in obs]
    if missing:
        raise ConfigError(f"the environment has no obs {missing[0]!r}; {available(obs, missing[0])}")
    return {key: np.array(obs[key]) for key in keys}
