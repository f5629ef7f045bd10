"""Runs episodes of a policy in one or several simulations, with one call of the policy per tick.

In a tick each simulation executes one chunk of actions, or begins an episode. The policy is asked in between, once, for
all episodes that go on. So an episode sees the same obs and actions in however many simulations the episodes run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.sim.acting import Actor
from cache_pipeline.sim.results import Episode
from cache_pipeline.sim.simulation import Play, Played, Reset
from cache_pipeline.sim.video import side_by_side

DEFAULT_HORIZON = 400
"""Default steps of an episode, as for most tasks of robomimic; the user or the environment override it."""

Film = list[NDArray[np.uint8]]


class Place(Protocol):
    """Where a simulation runs: one job is sent, then its result is received."""

    def send(self, job: Reset | Play) -> None: ...

    def receive(self) -> Played: ...


class Plan(NamedTuple):
    """The episodes to run.

    Attributes:
        seeds: seed of each episode.
        horizon: largest number of steps; None: that of the environment, else 400.
        action_steps: actions of each chunk to execute; None: half of the chunk.
        filmed: number of episodes to film, from the first one on.
    """

    seeds: Sequence[int]
    horizon: int | None = None
    action_steps: int | None = None
    filmed: int = 0


class _Running:
    """One episode in progress."""

    def __init__(self, index: int, actor: Actor, plan: Plan) -> None:
        self.index, self._actor, self._plan = index, actor, plan
        self.mind = actor.begin(plan.seeds[index])
        self.film: Film | None = [] if index < plan.filmed and actor.cameras else None
        self._started = time.monotonic()
        self._steps, self._horizon = 0, plan.horizon
        self._success = self._over = False
        self.begun = False

    @property
    def seed(self) -> int:
        return self._plan.seeds[self.index]

    def job(self, chunk: NDArray) -> Play:
        """Returns the job of executing the first actions of a chunk (Ta, A)."""
        assert self._horizon is not None
        wanted = self._plan.action_steps or math.ceil(len(chunk) / 2)
        actions = chunk[: min(wanted, self._horizon - self._steps)]
        return Play(actions, len(actions) if self.film is not None else self._actor.obs_horizon)

    def take(self, played: Played) -> None:
        """Takes the result of a job."""
        history = self.mind.history
        if self.begun:
            for obs in played.obs:
                history.add(obs)
        else:
            history.start(played.obs[0])
            self._horizon = self._horizon or played.horizon or DEFAULT_HORIZON
            self.begun = True
        if self.film is not None:
            self.film += [side_by_side(obs, self._actor.cameras) for obs in played.obs]
        self._steps += played.steps
        self._success, self._over = played.success, played.over

    def result(self) -> Episode | None:
        """Returns the result if the episode has ended."""
        assert self._horizon is not None
        if not (self._success or self._over or self._steps >= self._horizon):
            return None
        return Episode(self.seed, self._success, self._steps, time.monotonic() - self._started)


def run_episodes(
    places: Sequence[Place], actor: Actor, plan: Plan, finished: Callable[[int, Episode, Film | None], None]
) -> None:
    """Runs all episodes of ``plan``.

    Args:
        places: where episodes run side by side.
        finished: called with the number of an episode, its result and its film when it has ended.
    """
    waiting = iter(range(len(plan.seeds)))
    running: list[_Running | None] = [None] * len(places)
    while True:
        going_on = [episode for episode in running if episode is not None]
        chunks = iter(actor.act([episode.mind for episode in going_on])) if going_on else iter(())
        for number, place in enumerate(places):
            episode = running[number]
            if episode is not None:
                place.send(episode.job(next(chunks)))
            elif (index := next(waiting, None)) is not None:
                episode = running[number] = _Running(index, actor, plan)
                place.send(Reset(episode.seed))
        if not any(running):
            return
        for number, place in enumerate(places):
            episode = running[number]
            if episode is None:
                continue
            episode.take(place.receive())
            result = episode.result()
            if result is not None:
                finished(episode.index, result, episode.film)
                running[number] = None
