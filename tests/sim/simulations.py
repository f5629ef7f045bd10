"""Fake simulations and policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from cache_pipeline.errors import MissingExtraError
from cache_pipeline.sim.acting import Actor
from cache_pipeline.sim.environment import Step
from cache_pipeline.sim.episodes import Film, Plan, run_episodes
from cache_pipeline.sim.opengl import OpenGLError, load_robosuite
from cache_pipeline.sim.results import Episode
from cache_pipeline.sim.simulation import Local

LIFT = {"env_name": "Lift", "type": 1, "env_kwargs": {}}


def skip_without_simulator() -> None:
    """Skips the test, with the reason, on a machine where robosuite cannot render."""
    try:
        load_robosuite()
    except (MissingExtraError, OpenGLError) as error:
        pytest.skip(str(error))


class Counter:
    """Counts its actions; succeeds when ``goal`` of them were done."""

    over, horizon = False, None

    def __init__(self, goal: int) -> None:
        self.goal, self.done, self.rendered = goal, [], []

    def reset(self, seed: int) -> dict[str, np.ndarray]:
        self.done = []
        return self._obs(images=True)

    def step(self, action: np.ndarray, *, images: bool = True) -> Step:
        self.done.append(float(action[0]))
        return Step(self._obs(images=images), 0.0, len(self.done) >= self.goal)

    def _obs(self, *, images: bool) -> dict[str, np.ndarray]:
        obs = {"count": np.array([float(len(self.done))])}
        if images:
            self.rendered.append(len(self.done))
            obs["eye_image"] = np.full((4, 6, 3), len(self.done), np.uint8)
        return obs


class Planner:
    """Answers the k-th question with the chunk [10k, 10k + 1, …] and remembers what it was asked."""

    cameras: Mapping[str, tuple[int, ...]] = {"eye_image": (4, 6, 3)}
    low_dim: Mapping[str, tuple[int, ...]] = {"count": (1,)}
    obs_horizon = 2

    def __init__(
        self, chunk: int, env_args: dict[str, Any] | None = None, flags: dict[str, bool] | None = None
    ) -> None:
        self.chunk, self.env_args, self.render_flags = chunk, env_args, flags
        self.asked: list[dict[str, torch.Tensor]] = []

    def act(self, obs: dict[str, torch.Tensor]) -> torch.Tensor:
        self.asked.append(obs)
        first = 10 * (len(self.asked) - 1)
        return torch.arange(first, first + self.chunk, dtype=torch.float32).view(1, self.chunk, 1)


class CounterEnvironment(Counter):
    """A ``Counter`` in place of the simulator."""

    def __enter__(self) -> CounterEnvironment:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def played(
    envs: Sequence[Any], policy: Any, seeds: Sequence[int] = (0,), device: str = "cpu", **options: Any
) -> tuple[list[Episode], list[Film | None]]:
    """The results and films of the episodes of ``seeds``, run side by side in ``envs``, without their times."""
    actor = Actor(policy, device)
    found: dict[int, tuple[Episode, Film | None]] = {}

    def finished(index: int, episode: Episode, film: Film | None) -> None:
        found[index] = episode._replace(seconds=0.0), film

    run_episodes([Local(env, actor.keys) for env in envs], actor, Plan(seeds, **options), finished)
    results = [found[index] for index in range(len(seeds))]
    return [episode for episode, _ in results], [film for _, film in results]


def one(env: Any, policy: Any, **options: Any) -> Episode:
    return played([env], policy, **options)[0][0]
