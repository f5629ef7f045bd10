"""Environments of the user's own with gymnasium's interface: ``--env module_or_file.py:make``.

The factory is called without arguments and returns an environment:

    reset(seed=…) -> (obs, info)        step(action) -> (obs, reward, terminated, truncated, info)

``obs`` is a dict that has the obs keys of the run: images uint8 (H, W, 3), low-dim rows as they are in the dataset.
An episode has succeeded at the first step whose ``info`` has a true ``is_success`` (gymnasium-robotics, LeRobot's
environments) or ``success`` (Meta-World, ManiSkill). If ``info`` has neither, it has succeeded when the environment
terminates it with a reward above 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.errors import ConfigError, available
from cache_pipeline.factories import find_factory
from cache_pipeline.files import digest
from cache_pipeline.sim.environment import Obs, Step

FILE_MODULE = "_environment_"
SUCCESS_KEYS = ("is_success", "success")
FORM = "gymnasium's form is reset(seed=…) -> (obs, info), step(action) -> (obs, reward, terminated, truncated, info)"


@dataclass(frozen=True)
class FactoryOpening:
    """An environment that a factory makes, in the process where it is opened.

    Attributes:
        reference: ``module:make`` or ``path/to/file.py:make``.
        cameras: rgb obs key → (H, W).
        low_dim: low-dim key → shape of one row.
    """

    reference: str
    cameras: Mapping[str, tuple[int, int]]
    low_dim: Mapping[str, tuple[int, ...]]

    def open(self) -> FactoryEnvironment:
        """Runs the factory; raises ConfigError if it does not exist or makes no environment."""
        made = find_factory(self.reference, "the environment", lambda content: FILE_MODULE + digest(content)).make()
        for name in ("reset", "step"):
            if not callable(getattr(made, name, None)):
                raise ConfigError(f"{self.reference} returned a {type(made).__name__}, which has no {name}(); {FORM}")
        return FactoryEnvironment(made, self)


class FactoryEnvironment:
    """An environment with gymnasium's interface as a ``Simulation``."""

    def __init__(self, env: Any, opening: FactoryOpening) -> None:
        self._env, self._opening, self._reference = env, opening, opening.reference
        self.over = False
        limit = getattr(getattr(env, "spec", None), "max_episode_steps", None)
        self.horizon: int | None = limit if isinstance(limit, int) and limit > 0 else None

    def reset(self, seed: int) -> Obs:
        """Starts the episode of ``seed``; raises ConfigError if the obs are not those of the run."""
        self.over = False
        answer = self._env.reset(seed=seed)
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise ConfigError(f"reset of {self._reference} returned a {type(answer).__name__}, not (obs, info); {FORM}")
        self._check(answer[0])
        obs: Obs = answer[0]
        return obs

    def step(self, action: NDArray, *, images: bool = True) -> Step:
        answer = self._env.step(self._fitting(action))
        if not isinstance(answer, tuple) or len(answer) != 5:
            raise ConfigError(f"step of {self._reference} did not return five values; {FORM}")
        obs, reward, terminated, truncated, info = answer
        self.over = _true(terminated) or _true(truncated)
        return Step(obs, float(np.mean(np.asarray(reward))), succeeded(reward, terminated, info))

    def close(self) -> None:
        if callable(close := getattr(self._env, "close", None)):
            close()

    def _fitting(self, action: NDArray) -> NDArray:
        """Returns an action with the type of the action space, clipped to its limits."""
        space: Any = getattr(self._env, "action_space", None)
        if (shape := getattr(space, "shape", None)) is not None and tuple(shape) != action.shape:
            raise ConfigError(
                f"{self._reference} takes actions of shape {tuple(shape)}, but the run's are {action.shape}"
            )
        if not (hasattr(space, "low") and hasattr(space, "high")):
            return action.astype(np.float32)
        return np.clip(action, space.low, space.high).astype(space.dtype)

    def _check(self, obs: Any) -> None:
        if not isinstance(obs, Mapping):
            raise ConfigError(
                f"the obs of {self._reference} are a {type(obs).__name__}, not a dict; the run needs the keys "
                f"{', '.join([*self._opening.cameras, *self._opening.low_dim])}"
            )
        for key in (*self._opening.cameras, *self._opening.low_dim):
            if key not in obs:
                raise ConfigError(
                    f"{self._reference} has no obs {key!r}, which the run needs; {available(map(str, obs), key)}"
                )
        for camera, (height, width) in self._opening.cameras.items():
            images = np.asarray(obs[camera])
            if images.shape != (height, width, 3) or images.dtype != np.uint8:
                raise ConfigError(
                    f"{camera} of {self._reference} is {images.dtype} {images.shape}; the run needs images "
                    f"uint8 {(height, width, 3)}"
                )
        for key, shape in self._opening.low_dim.items():
            if np.shape(obs[key]) != tuple(shape):
                raise ConfigError(
                    f"{key} of {self._reference} has the shape {np.shape(obs[key])}; the run needs {tuple(shape)}"
                )

    def __enter__(self) -> FactoryEnvironment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def succeeded(reward: Any, terminated: Any, info: Mapping[str, Any]) -> bool:
    """Whether a step has brought success, by the conventions of this module."""
    for key in SUCCESS_KEYS:
        if key in info:
            return _true(info[key])
    return _true(terminated) and bool(np.asarray(reward).mean() > 0)


def _true(value: Any) -> bool:
    return bool(np.asarray(value).all())
