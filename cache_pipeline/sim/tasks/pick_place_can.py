"""A scripted expert for robosuite's PickPlaceCan: carry the can from its bin into its quarter of the other bin."""

from __future__ import annotations

from functools import partial

import numpy as np

from cache_pipeline.sim.tasks.script import (
    CLOSED,
    OPEN,
    Goal,
    Obs,
    Phase,
    ScriptedExpert,
    after,
    from_gripper,
    never,
    rise_to,
    turn_to,
    within,
)
from cache_pipeline.sim.tasks.task import Task

PLACE_XY = np.array([0.155, 0.345])
"""A point in the can's quarter (0.1 to 0.295, 0.28 to 0.525) that the arm reaches, in metres; not in ``object``."""
ABOVE_M = 0.1
"""Height above the can at which the descent starts, in metres."""
CARRY_M, RELEASE_M = 1.05, 0.92
"""Heights of the can's centre in the world when it is carried and released, in metres; standing, it is at 0.86."""


def to_can(obs: Obs) -> Goal:
    """Returns the way to the can.

    ``object``: the can's pose in the gripper's frame (7,), then its position (3,) and quaternion (4,) in the world.
    """
    return Goal(from_gripper(obs, obs["object"][7:10]), turn_to(obs))


def above_can(obs: Obs) -> Goal:
    return to_can(obs).above(ABOVE_M)


def to_place(obs: Obs) -> Goal:
    """Returns the way of the held can to the point where it is released."""
    return Goal(np.array([*PLACE_XY, RELEASE_M]) - obs["object"][7:10], turn_to(obs))


def over_place(obs: Obs) -> Goal:
    return to_place(obs).above(CARRY_M - RELEASE_M)


PHASES = (
    Phase("reach", above_can, OPEN, within(xy=0.012, z=0.03)),
    Phase("descend", to_can, OPEN, within(xy=0.012, z=0.01)),
    Phase("close", to_can, CLOSED, after(5)),
    Phase("raise", lambda obs: over_place(obs).straight_up(), CLOSED, within(z=0.03)),
    Phase("carry", over_place, CLOSED, within(xy=0.03, z=0.05)),
    Phase("lower", to_place, CLOSED, within(xy=0.05, z=0.02)),
    Phase("release", to_place, OPEN, after(3)),
    Phase("retreat", rise_to(CARRY_M), OPEN, never),
)
PICK_PLACE_CAN = Task(
    name="PickPlaceCan",
    env_name="PickPlaceCan",
    expert=partial(ScriptedExpert, PHASES),
    horizon=450,
    rollout_horizon=600,
)
