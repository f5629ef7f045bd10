"""A scripted expert for robosuite's Lift with an OSC_POSE controller: reach above the cube, descend, close, lift."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.sim.tasks.task import Task

ABOVE_M = 0.06
"""Height above the cube at which the descent starts, in metres."""
NEAR_XY_M, NEAR_Z_M = 0.012, 0.02
"""Largest distance to the point above the cube at which the descent starts, in metres."""
GRASP_Z_M = 0.006
"""Largest height above the cube's centre at which the gripper closes, in metres."""
CLOSE_STEPS = 5
GAIN_PER_M = 9.0
"""Action per metre of error; an action of 1 moves the controller's goal by 0.05 m."""
LIFT_ACTION = 0.8
OPEN, CLOSED = -1.0, 1.0


class Phase(NamedTuple):
    """Phase of the script, and its number of steps so far."""

    name: Literal["reach", "descend", "close", "lift"] = "reach"
    steps: int = 0


def lift_phase(obs: Mapping[str, NDArray], phase: Phase) -> Phase:
    """Returns the phase of the next step from the obs and the phase of the last step."""
    offset = _cube(obs) - obs["robot0_eef_pos"]
    aligned = float(np.linalg.norm(offset[:2])) < NEAR_XY_M
    done = {
        "reach": aligned and abs(offset[2] + ABOVE_M) < NEAR_Z_M,
        "descend": aligned and abs(offset[2]) < GRASP_Z_M,
        "close": phase.steps >= CLOSE_STEPS,
        "lift": False,
    }[phase.name]
    if not done:
        return Phase(phase.name, phase.steps + 1)
    following: dict[str, Literal["descend", "close", "lift"]] = {
        "reach": "descend",
        "descend": "close",
        "close": "lift",
    }
    return Phase(following[phase.name], 1)


def lift_action(obs: Mapping[str, NDArray], phase: Phase, noise: NDArray | None = None) -> NDArray[np.float64]:
    """Returns the action (7,) of ``phase``: goal displacement xyz and rotation in [-1, 1]; gripper -1 open, 1 closed.

    Args:
        obs: ``robot0_eef_pos`` (3,) in metres and ``object`` (≥3,), which begins with the cube's position.
        phase: from ``lift_phase``.
        noise: (3,) added to the displacement before clipping.
    """
    offset = _cube(obs) - obs["robot0_eef_pos"]
    if phase.name == "reach":
        offset[2] += ABOVE_M
    move = GAIN_PER_M * offset
    if phase.name == "lift":
        move = np.array([0.0, 0.0, LIFT_ACTION])
    if noise is not None:
        move = move + noise
    gripper = OPEN if phase.name in ("reach", "descend") else CLOSED
    return np.concatenate([np.clip(move, -1, 1), np.zeros(3), [gripper]])


def _cube(obs: Mapping[str, NDArray]) -> NDArray[np.float64]:
    return np.array(obs["object"][:3], dtype=np.float64)


class LiftExpert:
    """Follows the script of one episode."""

    def __init__(self) -> None:
        self._phase = Phase()

    def act(self, obs: Mapping[str, NDArray], noise: NDArray) -> NDArray[np.float64]:
        """See ``Expert``; noise (3,) in action units."""
        self._phase = lift_phase(obs, self._phase)
        return lift_action(obs, self._phase, noise)


LIFT = Task(name="Lift", env_name="Lift", expert=LiftExpert, horizon=150, rollout_horizon=200)
