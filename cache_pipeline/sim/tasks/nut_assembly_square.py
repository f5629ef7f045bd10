"""A scripted expert for robosuite's NutAssemblySquare, robomimic's Square: put the nut on the peg by its handle."""

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
    rotation,
    shortest,
    turn_to,
    within,
)
from cache_pipeline.sim.tasks.task import Task

HANDLE = np.array([0.054, 0.0, 0.0])
"""Middle of the handle in the nut's frame, in metres. The handle lies along x and is 32 mm wide."""
PEG_XY = np.array([0.23, 0.1])
"""The square peg in the world, in metres; not in ``object``. The nut's hole leaves 7 mm on each side."""
FITS_RAD = (-np.pi / 2, np.pi / 2, np.pi)
"""Headings of the handle at which the nut fits. Heading 0 fits too, but then the gripper is out of the arm's reach."""
ABOVE_M = 0.08
"""Height above the handle at which the descent starts, in metres."""
CARRY_M, RELEASE_M = 1.0, 0.9
"""Heights of the nut in the world when it is carried and released, in metres; the peg ends at 0.95."""


def to_handle(obs: Obs) -> Goal:
    """Returns the way to the handle, across which the fingers close.

    ``object``: the nut's pose in the gripper's frame (7,), then its position (3,) and quaternion (4,) in the world.
    """
    position, axes = obs["object"][7:10], rotation(obs["object"][10:14])
    return Goal(from_gripper(obs, position + axes @ HANDLE), turn_to(obs, heading(axes[:, 1])))


def above_handle(obs: Obs) -> Goal:
    return to_handle(obs).above(ABOVE_M)


def on_peg(obs: Obs) -> Goal:
    """Returns the way of the held nut to the height of its release on the peg, and to the nearest heading that fits."""
    position, axes = obs["object"][7:10], rotation(obs["object"][10:14])
    spin = min((shortest(fit - heading(axes[:, 0]), 2 * np.pi) for fit in FITS_RAD), key=abs)
    return Goal(np.array([*PEG_XY, RELEASE_M]) - position, turn_to(obs) + np.array([0.0, 0.0, spin]))


def over_peg(obs: Obs) -> Goal:
    return on_peg(obs).above(CARRY_M - RELEASE_M)


PHASES = (
    Phase("reach", above_handle, OPEN, within(xy=0.01, z=0.02, turn=0.1)),
    Phase("descend", to_handle, OPEN, within(xy=0.01, z=0.006)),
    Phase("close", to_handle, CLOSED, after(11)),
    Phase("raise", lambda obs: over_peg(obs).straight_up(), CLOSED, within(z=0.02)),
    Phase("carry", over_peg, CLOSED, within(xy=0.004, z=0.02, turn=0.05)),
    Phase("lower", on_peg, CLOSED, within(xy=0.02, z=0.01)),
    Phase("release", on_peg, OPEN, never),
)
NUT_ASSEMBLY_SQUARE = Task(
    name="NutAssemblySquare",
    env_name="NutAssemblySquare",
    expert=partial(ScriptedExpert, PHASES),
    horizon=450,
    rollout_horizon=600,
)
