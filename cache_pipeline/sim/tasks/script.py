"""Experts that follow a list of phases, for one arm with a parallel gripper and robosuite's OSC_POSE controller."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Obs = Mapping[str, NDArray]
OPEN, CLOSED = -1.0, 1.0
MOVE_PER_M = 9.0
"""Action per metre that is left; an action of 1 moves the controller's goal by 0.05 m."""
TURN_PER_RAD = 2.0
"""Action per radian that is left; an action of 1 turns the controller's goal by 0.5 rad."""
DOWN = np.array([0.0, 0.0, -1.0])


class Goal(NamedTuple):
    """What the gripper still has to do, in the world's frame."""

    move: NDArray[np.float64]
    """(3,) in metres."""
    turn: NDArray[np.float64] = np.zeros(3)
    """Rotation vector, (3,) in radians."""

    def above(self, height: float) -> Goal:
        """Returns the goal that lies ``height`` metres higher."""
        return self._replace(move=self.move + np.array([0.0, 0.0, height]))

    def straight_up(self) -> Goal:
        """Returns the goal at the same height, above or below where the gripper is now."""
        return self._replace(move=self.move * np.array([0.0, 0.0, 1.0]))


Done = Callable[[Obs, Goal, int], bool]
"""Whether a phase has ended: takes the obs and the goal of now, and the steps that the phase has lasted."""


class Phase(NamedTuple):
    """A part of a script: where to go, what the gripper does, and when the next phase begins."""

    name: str
    goal: Callable[[Obs], Goal]
    gripper: float
    done: Done


def within(*, xy: float = np.inf, z: float = np.inf, turn: float = np.inf) -> Done:
    """Returns the end of a phase: less than ``xy`` and ``z`` metres and ``turn`` radians are left."""

    def done(obs: Obs, goal: Goal, steps: int) -> bool:
        near = float(np.linalg.norm(goal.move[:2])) < xy and abs(float(goal.move[2])) < z
        return near and float(np.linalg.norm(goal.turn)) < turn

    return done


def after(count: int) -> Done:
    """Returns the end of a phase that lasts ``count`` steps."""
    return lambda obs, goal, steps: steps >= count


def never(obs: Obs, goal: Goal, steps: int) -> bool:
    """The end of a script's last phase."""
    return False


class ScriptedExpert:
    """Follows the phases in order through one episode."""

    def __init__(self, phases: Sequence[Phase]) -> None:
        self._phases = phases
        self._index = self._steps = 0

    @property
    def phase(self) -> Phase:
        """The phase of the last action."""
        return self._phases[self._index]

    def act(self, obs: Obs, noise: NDArray) -> NDArray[np.float64]:
        """Returns the action (7,): the goal's displacement and rotation in [-1, 1]; -1 opens and 1 closes the gripper.

        Args:
            obs: see ``Expert``.
            noise: (3,) added to the displacement before clipping.
        """
        goal = self.phase.goal(obs)
        if self.phase.done(obs, goal, self._steps):
            self._index, self._steps = self._index + 1, 0
            goal = self.phase.goal(obs)
        self._steps += 1
        move, turn = MOVE_PER_M * goal.move + noise, TURN_PER_RAD * goal.turn
        return np.concatenate([np.clip(move, -1, 1), np.clip(turn, -1, 1), [self.phase.gripper]])


def from_gripper(obs: Obs, point: NDArray) -> NDArray[np.float64]:
    """Returns the vector (3,) from the middle between the fingertips to a point (3,) of the world, in metres."""
    return np.asarray(point - obs["robot0_eef_pos"], dtype=np.float64)


def rise_to(height: float) -> Callable[[Obs], Goal]:
    """Returns the way straight up or down to ``height`` metres in the world, without a turn."""
    return lambda obs: Goal(np.array([0.0, 0.0, height - obs["robot0_eef_pos"][2]]))


def turn_to(obs: Obs, yaw: float | None = None, approach: NDArray = DOWN) -> NDArray[np.float64]:
    """Returns the rotation vector (3,) that points the gripper along ``approach`` and closes its fingers along ``yaw``.

    Args:
        obs: ``robot0_eef_quat``; the gripper points along the hand's z, and its fingers move along the hand's y.
        yaw: heading of the line on which the fingers close, in radians; None leaves it. Both directions are as good.
        approach: unit vector (3,), by default straight down.
    """
    hand = rotation(obs["robot0_eef_quat"])
    turn = np.cross(hand[:, 2], approach)
    if yaw is not None:
        turn = turn + np.array([0.0, 0.0, shortest(yaw - heading(hand[:, 1]), np.pi)])
    return np.asarray(turn)


def rotation(quat: NDArray) -> NDArray[np.float64]:
    """Returns the matrix (3, 3) of a unit quaternion (x, y, z, w)."""
    x, y, z, w = (float(value) for value in quat)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def heading(axis: NDArray) -> float:
    """Returns the angle of a vector in the horizontal plane, in radians from x towards y."""
    return float(np.arctan2(axis[1], axis[0]))


def shortest(angle: float, period: float) -> float:
    """Returns the smallest angle in size that equals ``angle`` modulo ``period``, in radians."""
    return float((angle + period / 2) % period - period / 2)
