"""A scripted expert for robosuite's Lift: reach above the cube, descend, close, lift."""

from __future__ import annotations

from functools import partial

import numpy as np

from cache_pipeline.sim.tasks.script import (
    CLOSED,
    MOVE_PER_M,
    OPEN,
    Goal,
    Obs,
    Phase,
    ScriptedExpert,
    after,
    from_gripper,
    never,
    within,
)
from cache_pipeline.sim.tasks.task import Task

ABOVE_M = 0.06
"""Height above the cube at which the descent starts, in metres."""
LIFT_ACTION = 0.8


def to_cube(obs: Obs) -> Goal:
    """Returns the way to the cube's centre, with which ``object`` begins. The gripper does not turn."""
    return Goal(from_gripper(obs, obs["object"][:3]))


def above_cube(obs: Obs) -> Goal:
    return to_cube(obs).above(ABOVE_M)


def up(obs: Obs) -> Goal:
    return Goal(np.array([0.0, 0.0, LIFT_ACTION / MOVE_PER_M]))


PHASES = (
    Phase("reach", above_cube, OPEN, within(xy=0.012, z=0.02)),
    Phase("descend", to_cube, OPEN, within(xy=0.012, z=0.006)),
    Phase("close", to_cube, CLOSED, after(5)),
    Phase("lift", up, CLOSED, never),
)
LIFT = Task(name="Lift", env_name="Lift", expert=partial(ScriptedExpert, PHASES), horizon=150, rollout_horizon=200)
