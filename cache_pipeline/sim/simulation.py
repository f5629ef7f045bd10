"""The interface of a simulation, and how one is opened in this process or another."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

from cache_pipeline.sim.environment import Environment, Obs, Step
from cache_pipeline.sim.history import chosen


class Simulation(Protocol):
    """Interface of an environment in an episode. What it does depends on the seed and the actions alone."""

    @property
    def over(self) -> bool:
        """Whether the environment has ended the episode; the next call is ``reset``."""

    @property
    def horizon(self) -> int | None:
        """Steps of an episode, if the environment limits them itself."""

    def reset(self, seed: int) -> Obs:
        """Starts the episode of ``seed`` and returns its first obs."""

    def step(self, action: NDArray, *, images: bool = True) -> Step:
        """Executes ``action`` (A,). Without ``images`` the obs may lack those of the cameras."""


class Opening(Protocol):
    """Says how a simulation is opened. It can be pickled."""

    def open(self) -> AbstractContextManager[Simulation]:
        """Builds the simulation."""


@dataclass(frozen=True)
class RobosuiteOpening:
    """A robosuite task. Arguments as in ``Environment.from_env_args``."""

    env_args: Mapping[str, Any]
    cameras: Mapping[str, tuple[int, int]]
    render_flags: Mapping[str, bool] | None = None

    def open(self) -> AbstractContextManager[Simulation]:
        return Environment.from_env_args(self.env_args, self.cameras, self.render_flags)


class Reset(NamedTuple):
    """Asks for the first obs of the episode of ``seed``."""

    seed: int


class Play(NamedTuple):
    """Asks for the execution of actions (n, A), up to success or the end of the episode."""

    actions: NDArray
    kept: int
    """Number of obs to return, those after the last actions. Images of other steps are not rendered."""


class Played(NamedTuple):
    """What a ``Reset`` or ``Play`` led to.

    Attributes:
        obs: the obs that were asked for, oldest first; fewer if the episode has ended before.
        steps: executed actions.
        over: whether the environment has ended the episode.
        horizon: steps of an episode, if the environment limits them itself.
    """

    obs: list[Obs]
    steps: int
    success: bool
    over: bool
    horizon: int | None


def perform(simulation: Simulation, keys: tuple[str, ...], job: Reset | Play) -> Played:
    """Does one job, and returns the obs of ``keys``; raises ConfigError if the environment lacks one of these."""
    if isinstance(job, Reset):
        first = chosen(simulation.reset(job.seed), keys)
        return Played([first], 0, False, False, simulation.horizon)
    obs, steps, success = [], 0, False
    for steps, action in enumerate(job.actions, start=1):
        kept = steps > len(job.actions) - job.kept
        step = simulation.step(action, images=kept)
        if kept:
            obs.append(chosen(step.obs, keys))
        success = step.success
        if success or simulation.over:
            break
    return Played(obs, steps, success, simulation.over, simulation.horizon)


class Local:
    """A simulation in this process. Jobs are done when they are sent."""

    def __init__(self, simulation: Simulation, keys: tuple[str, ...]) -> None:
        self._simulation, self._keys = simulation, keys
        self._played: Played | None = None

    def send(self, job: Reset | Play) -> None:
        assert self._played is None
        self._played = perform(self._simulation, self._keys, job)

    def receive(self) -> Played:
        played, self._played = self._played, None
        assert played is not None
        return played
