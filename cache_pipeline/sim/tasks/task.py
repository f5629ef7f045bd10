"""What a task with a scripted expert consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray

LOW_DIM_KEYS = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")
"""Low-dim obs of a collected file: robomimic's choice for tasks with one arm."""


class Expert(Protocol):
    """Controls one episode. It may keep a state, such as the phase of its script."""

    def act(self, obs: Mapping[str, NDArray], noise: NDArray) -> NDArray:
        """Returns the action (A,) for ``obs``; called once per step, in order.

        Args:
            obs: the obs of ``Environment``; metres, and quaternions as (x, y, z, w).
            noise: (3,) in action units; the expert adds it to the displacement of its goal.
        """


@dataclass(frozen=True, kw_only=True)
class Task:
    """A robosuite environment with an expert. ``collect --task NAME`` writes its demos."""

    name: str
    """What the user types."""
    env_name: str
    """robosuite's class."""
    expert: Callable[[], Expert]
    """Makes the expert of one episode."""
    horizon: int
    """An expert's episode that takes more steps has failed."""
    rollout_horizon: int
    """Steps of a rollout, recorded in ``env_args``: about four times an expert's episode."""
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the class beside those that every task gets."""
    low_dim_keys: tuple[str, ...] = LOW_DIM_KEYS
