"""The scripted expert, on a simulated point that follows its actions exactly."""

from __future__ import annotations

import numpy as np
import pytest

from cache_pipeline.sim.tasks.lift import ABOVE_M, CLOSE_STEPS, CLOSED, OPEN, Phase, lift_action, lift_phase

CUBE = np.array([0.02, -0.01, 0.82])


def obs_at(position: np.ndarray) -> dict[str, np.ndarray]:
    return {"robot0_eef_pos": np.asarray(position, dtype=float), "object": np.concatenate([CUBE, np.zeros(7)])}


def test_a_point_arm_goes_through_the_phases_in_order_and_ends_above_the_cube() -> None:
    position, phase, names = np.array([-0.1, 0.05, 1.02]), Phase(), []
    for _ in range(80):
        phase = lift_phase(obs_at(position), phase)
        action = lift_action(obs_at(position), phase)
        if not names or names[-1] != phase.name:
            names.append(phase.name)
        position = position + 0.03 * action[:3]
    assert names == ["reach", "descend", "close", "lift"]
    assert position[2] > CUBE[2] + ABOVE_M


def test_the_gripper_is_open_until_it_closes_at_the_cube() -> None:
    grippers = {name: lift_action(obs_at(CUBE), Phase(name, 1))[6] for name in ("reach", "descend", "close", "lift")}
    assert grippers == {"reach": OPEN, "descend": OPEN, "close": CLOSED, "lift": CLOSED}


def test_closing_lasts_its_steps() -> None:
    phase, lasted = Phase("descend", 3), 0
    while phase.name != "lift":
        phase = lift_phase(obs_at(CUBE), phase)
        lasted += phase.name == "close"
    assert lasted == CLOSE_STEPS


def test_the_arm_does_not_descend_beside_the_cube() -> None:
    beside = CUBE + np.array([0.05, 0.0, ABOVE_M])
    assert lift_phase(obs_at(beside), Phase("reach", 9)).name == "reach"


def test_noise_moves_the_goal_and_actions_stay_within_the_limits() -> None:
    obs = obs_at(CUBE + np.array([0.0, 0.0, ABOVE_M]))
    assert lift_action(obs, Phase(), np.array([0.2, 0.0, 0.0]))[0] == pytest.approx(0.2)
    assert np.abs(lift_action(obs_at(CUBE + 5), Phase(), np.full(3, 9.0))).max() <= 1


def test_acting_does_not_change_the_obs() -> None:
    obs = obs_at(CUBE)
    lift_action(obs, Phase(), np.ones(3))
    np.testing.assert_array_equal(obs["object"][:3], CUBE)
