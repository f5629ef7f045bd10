"""A scripted expert for robosuite's Stack: grasp the red cube at its faces, set it on the green one."""

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
    heading,
    never,
    rise_to,
    rotation,
    shortest,
    turn_to,
    within,
)
from cache_pipeline.sim.tasks.task import Task

ABOVE_M = 0.08
"""Height above the red cube at which the descent starts, in metres."""
STACKED_M = 0.045
"""Height of the red cube's centre over the green one's when it stands there: half an edge of each, in metres."""
CLEARANCE_M = 0.03
"""Height of the red cube over its place when it is carried there, in metres."""
RETREAT_M = 1.0
"""Height in the world to which the gripper rises at the end, in metres."""


def to_red(obs: Obs) -> Goal:
    """Returns the way to the red cube. Of its pairs of faces, the fingers take the one away from the green cube.

    ``object``: position (3,) and quaternion (4,) of the red cube, robosuite's A, then of the green one, B.
    """
    red, green = obs["object"][:3], obs["object"][7:10]
    aside = heading(green - red) + np.pi / 2
    face = heading(rotation(obs["object"][3:7])[:, 0])
    return Goal(from_gripper(obs, red), turn_to(obs, aside + shortest(face - aside, np.pi / 2)))


def above_red(obs: Obs) -> Goal:
    return to_red(obs).above(ABOVE_M)


def to_place(obs: Obs) -> Goal:
    """Returns the way of the held red cube to its place on the green one."""
    return Goal(obs["object"][7:10] - obs["object"][:3], turn_to(obs)).above(STACKED_M)


def over_place(obs: Obs) -> Goal:
    return to_place(obs).above(CLEARANCE_M)


PHASES = (
    Phase("reach", above_red, OPEN, within(xy=0.01, z=0.02, turn=0.1)),
    Phase("descend", to_red, OPEN, within(xy=0.01, z=0.006)),
    Phase("close", to_red, CLOSED, after(5)),
    Phase("raise", lambda obs: over_place(obs).straight_up(), CLOSED, within(z=0.015)),
    Phase("carry", over_place, CLOSED, within(xy=0.006, z=0.02)),
    Phase("lower", to_place, CLOSED, within(xy=0.01, z=0.006)),
    Phase("release", to_place, OPEN, after(4)),
    Phase("retreat", rise_to(RETREAT_M), OPEN, never),
)
STACK = Task(name="Stack", env_name="Stack", expert=partial(ScriptedExpert, PHASES), horizon=300, rollout_horizon=400)
