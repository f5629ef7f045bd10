"""A scripted expert for robosuite's Door: grasp the handle from above, press it down, pull the door open."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.sim.tasks.script import (
    CLOSED,
    OPEN,
    Goal,
    Obs,
    Phase,
    ScriptedExpert,
    after,
    from_gripper,
    heading,
    never,
    rise_to,
    turn_to,
    within,
)
from cache_pipeline.sim.tasks.task import Task

HINGE = np.array([0.255, 0.0, 0.0])
"""Hinge in the door's frame, in metres: x along the door, y into it, z up. ``object`` holds neither it nor LATCH."""
LATCH = np.array([-0.175, -0.1, -0.025])
"""Point about which the handle turns, in the door's frame, in metres."""
LEVER_M = 0.125
"""From there to the point of the handle that ``object`` holds, in metres."""
START_M, ABOVE_M = 1.17, 0.1
"""Height in the world to which the gripper rises first, and distance to the handle where it descends, in metres."""
TILT_RAD = 0.3
"""The gripper leans away from the door, because upright its hand, 0.2 m wide, would touch the door."""
PRESSED_RAD, FREE_RAD = 1.35, 1.25
"""Angle to which the handle is pressed, and angle at which the pull begins. At 1.18 the latch still catches."""
OPENED_RAD = 0.39
"""Angle to which the door is pulled; it counts as open at 0.3 and stops at 0.4."""
PRESS_LEAD_RAD, PULL_LEAD_RAD = 0.3, 0.2
"""Angle by which the gripper's goal is ahead of the handle and of the door."""


class Door(NamedTuple):
    """Where the door is."""

    hinge: NDArray[np.float64]
    """(3,) in the world, in metres."""
    yaw: float
    """Heading of the door's x, in radians; so are the others."""
    opened: float
    pressed: float

    def handle_at(self, opened: float, pressed: float) -> NDArray[np.float64]:
        """Returns the handle's position (3,) in the world at other angles of door and handle."""
        return self.hinge + about_z(self.yaw + opened - self.opened) @ (handle_in_door(pressed) - HINGE)

    def approach(self) -> NDArray[np.float64]:
        """Returns the direction (3,) in which the gripper points: down, and towards the door."""
        return about_z(self.yaw) @ np.array([0.0, np.sin(TILT_RAD), -np.cos(TILT_RAD)])


def door_of(obs: Obs) -> Door:
    """Reads ``object``: position (3,) of door and handle, angle of the door, two vectors (3,), angle of the handle."""
    door, handle, opened, pressed = obs["object"][:3], obs["object"][3:6], obs["object"][6], obs["object"][13]
    yaw = heading(handle - door) - heading(handle_in_door(pressed))
    return Door(door + about_z(yaw) @ HINGE, yaw, float(opened), float(pressed))


def handle_in_door(pressed: float) -> NDArray[np.float64]:
    return LATCH + LEVER_M * np.array([np.cos(pressed), 0.0, -np.sin(pressed)])


def about_z(angle: float) -> NDArray[np.float64]:
    """Returns the matrix (3, 3) of a rotation about the vertical by ``angle`` radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])


def to_point(obs: Obs, door: Door, point: NDArray) -> Goal:
    """Returns the way to a point of the world, with one finger on either side of the handle."""
    return Goal(from_gripper(obs, point), turn_to(obs, door.yaw + np.pi / 2, door.approach()))


def to_handle(obs: Obs) -> Goal:
    return to_point(obs, door_of(obs), obs["object"][3:6])


def above_handle(obs: Obs) -> Goal:
    door = door_of(obs)
    return to_point(obs, door, obs["object"][3:6] - ABOVE_M * door.approach())


def press(obs: Obs) -> Goal:
    door = door_of(obs)
    return to_point(obs, door, door.handle_at(door.opened, min(PRESSED_RAD, door.pressed + PRESS_LEAD_RAD)))


def pull(obs: Obs) -> Goal:
    door = door_of(obs)
    return to_point(obs, door, door.handle_at(min(OPENED_RAD, door.opened + PULL_LEAD_RAD), PRESSED_RAD))


def latch_is_free(obs: Obs, goal: Goal, steps: int) -> bool:
    return door_of(obs).pressed > FREE_RAD


PHASES = (
    Phase("rise", rise_to(START_M), OPEN, within(z=0.02)),
    Phase("reach", above_handle, OPEN, within(xy=0.01, z=0.03, turn=0.1)),
    Phase("descend", to_handle, OPEN, within(xy=0.012, z=0.008)),
    Phase("close", to_handle, CLOSED, after(11)),
    Phase("press", press, CLOSED, latch_is_free),
    Phase("pull", pull, CLOSED, never),
)
DOOR = Task(name="Door", env_name="Door", expert=partial(ScriptedExpert, PHASES), horizon=400, rollout_horizon=550)
