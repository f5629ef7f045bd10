"""The scripted experts, on a simulated point gripper that follows its actions exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from cache_pipeline.cli import app
from cache_pipeline.sim.tasks import TASK_NAMES, door, lift, nut_assembly_square, pick_place_can, stack
from cache_pipeline.sim.tasks.registry import TASKS
from cache_pipeline.sim.tasks.script import (
    CLOSED,
    OPEN,
    Goal,
    Obs,
    Phase,
    ScriptedExpert,
    after,
    heading,
    never,
    rotation,
    shortest,
    turn_to,
    within,
)

SAMPLE = Path(__file__).parents[2] / "data" / "lift_sample.hdf5"
UPSIDE_DOWN = np.array([1.0, 0.0, 0.0, 0.0])
"""Quaternion of a hand that points down: half a turn about x."""
NO_NOISE = np.zeros(3)


def about(axis: Sequence[float], angle: float) -> np.ndarray:
    """Quaternion (x, y, z, w) of a rotation about a unit axis."""
    return np.array([*(np.sin(angle / 2) * np.asarray(axis)), np.cos(angle / 2)])


def times(first: np.ndarray, then: np.ndarray) -> np.ndarray:
    """Quaternion of the rotation ``then`` after ``first``, both in the world's frame."""
    u, v = then[:3], first[:3]
    return np.array([*(then[3] * v + first[3] * u + np.cross(u, v)), then[3] * first[3] - u @ v])


class Arm:
    """A point gripper beside one thing, which moves with it while the closed fingers are at its grip."""

    def __init__(
        self,
        thing: Sequence[float],
        object_of: Callable[[np.ndarray, np.ndarray], Sequence[np.ndarray]] = lambda thing, turned: (thing, turned),
        yaw: float = 0.0,
        grip: Sequence[float] = (0.0, 0.0, 0.0),
    ) -> None:
        """``object_of`` gives the parts of the obs ``object`` from the thing's position and quaternion."""
        self.at, self.hand = np.array([-0.1, 0.02, 1.03]), times(UPSIDE_DOWN, about((0, 0, 1), 0.1))
        self.thing, self.turned, self.grip = np.array(thing), about((0, 0, 1), yaw), np.array(grip)
        self.object_of = object_of

    def obs(self) -> dict[str, np.ndarray]:
        thing = np.concatenate([np.asarray(part) for part in self.object_of(self.thing, self.turned)])
        return {"robot0_eef_pos": self.at, "robot0_eef_quat": self.hand, "object": thing}

    def step(self, action: np.ndarray) -> None:
        move, vector = 0.03 * action[:3], 0.3 * action[3:6]
        angle = float(np.linalg.norm(vector))
        turn = about(vector / angle, angle) if angle > 0 else about((0, 0, 1), 0.0)
        if action[6] == CLOSED and np.linalg.norm(self.thing + rotation(self.turned) @ self.grip - self.at) < 0.02:
            self.thing = self.at + move + rotation(turn) @ (self.thing - self.at)
            self.turned = times(self.turned, turn)
        self.at, self.hand = self.at + move, times(self.hand, turn)

    def fingers(self) -> np.ndarray:
        """Unit vector on which the fingers move."""
        return rotation(self.hand)[:, 1]


def follow(phases: Sequence[Phase], world: Arm | PointDoor) -> list[str]:
    """Runs the script; returns the names of the phases in the order in which they began."""
    expert = ScriptedExpert(phases)
    names: list[str] = []
    for _ in range(250):
        action = expert.act(world.obs(), NO_NOISE)
        if expert.phase.name not in names:
            names.append(expert.phase.name)
        world.step(action)
    return names


def names_of(phases: Sequence[Phase]) -> list[str]:
    return [phase.name for phase in phases]


CUBE = np.array([0.02, -0.01, 0.82])


# The common pieces.


def test_phases_follow_each_other_when_they_are_done_and_the_last_one_stays() -> None:
    ahead = Goal(np.array([0.01, 0.0, 0.0]))
    phases = (
        Phase("close", lambda obs: ahead, CLOSED, after(3)),
        Phase("open", lambda obs: ahead, OPEN, within(xy=0.02)),
        Phase("stay", lambda obs: ahead, OPEN, never),
    )
    expert = ScriptedExpert(phases)
    names = []
    for _ in range(7):
        expert.act({}, NO_NOISE)
        names.append(expert.phase.name)
    assert names == ["close"] * 3 + ["open"] + ["stay"] * 3


def test_noise_moves_the_goal_and_actions_stay_within_the_limits() -> None:
    goal = Goal(np.array([0.0, 0.0, 9.0]), np.array([0.0, 0.0, -9.0]))
    action = ScriptedExpert([Phase("far", lambda obs: goal, CLOSED, never)]).act({}, np.array([0.2, -9.0, 0.0]))
    np.testing.assert_array_equal(action, [0.2, -1, 1, 0, 0, -1, CLOSED])


@pytest.mark.parametrize(
    ("left", "done"), [((0.0, 0.009, 0.0), True), ((0.011, 0.0, 0.0), False), ((0, 0, 0.3), False)]
)
def test_a_goal_is_near_in_each_of_its_tolerances(left: tuple[float, ...], done: bool) -> None:
    assert within(xy=0.01, z=0.2)({}, Goal(np.array(left)), 1) is done
    assert not within(turn=0.1)({}, Goal(np.zeros(3), np.array([0.0, 0.0, 0.2])), 1)


def test_the_shortest_of_equal_angles_is_at_most_half_a_period() -> None:
    assert shortest(3.0, np.pi) == pytest.approx(3.0 - np.pi)
    assert shortest(-2.0, np.pi / 2) == pytest.approx(-2.0 + np.pi / 2)
    assert shortest(0.3, np.pi) == pytest.approx(0.3)


@pytest.mark.parametrize("yaw", [None, -2.0, 0.0, 0.4, 1.5, 3.0])
@pytest.mark.parametrize("tilt", [0.0, 0.3])
def test_turning_ends_with_the_gripper_along_its_approach_and_the_fingers_along_the_yaw(
    yaw: float | None, tilt: float
) -> None:
    approach = np.array([0.0, -np.sin(tilt), -np.cos(tilt)])
    arm = Arm(CUBE)
    arm.hand = times(arm.hand, about((0, 1, 0), 0.2))
    for _ in range(60):
        arm.step(np.array([0, 0, 0, *np.clip(2 * turn_to(arm.obs(), yaw, approach), -1, 1), OPEN]))
    np.testing.assert_allclose(rotation(arm.hand)[:, 2], approach, atol=0.02)
    if yaw is not None:
        assert shortest(heading(arm.fingers()) - yaw, np.pi) == pytest.approx(0, abs=0.02)


# The list of tasks.


def test_the_help_of_collect_lists_the_tasks() -> None:
    shown = CliRunner().invoke(app, ["collect", "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert [name for name in TASK_NAMES if name not in shown.output] == []


def test_the_names_in_the_help_are_those_of_the_experts() -> None:
    assert tuple(TASKS) == TASK_NAMES
    assert [task.env_name for task in TASKS.values()] == list(TASKS)


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_acting_does_not_change_the_obs_and_each_episode_has_an_expert_of_its_own(task) -> None:
    obs = Arm(CUBE, lambda thing, turned: (np.full(23, 0.5),)).obs()
    kept = {key: values.copy() for key, values in obs.items()}
    first = task.expert()
    for _ in range(3):
        action = first.act(obs, np.ones(3))
    assert action.shape == (7,)
    for key, values in obs.items():
        np.testing.assert_array_equal(values, kept[key])
    assert task.expert() is not first


# Lift.


def test_lift_goes_through_the_phases_in_order_and_the_cube_rises() -> None:
    arm = Arm(CUBE)
    assert follow(lift.PHASES, arm) == ["reach", "descend", "close", "lift"]
    assert arm.thing[2] > CUBE[2] + lift.ABOVE_M


def test_the_arm_does_not_descend_beside_the_cube() -> None:
    arm, expert = Arm(CUBE), lift.LIFT.expert()
    arm.at = CUBE + np.array([0.05, 0.0, lift.ABOVE_M])
    for _ in range(9):
        action = expert.act(arm.obs(), NO_NOISE)
    assert expert.phase.name == "reach"
    np.testing.assert_allclose(action, [-0.45, 0, 0, 0, 0, 0, OPEN], atol=1e-9)


def test_lifts_expert_gives_the_actions_of_the_sample_bit_for_bit() -> None:
    """The obs of the file are those that the expert saw. The noise is that of attempt 0 of seed 0."""
    seed = np.random.SeedSequence([0, 0]).generate_state(2)[1]
    noise = 0.1 * np.random.default_rng(seed).standard_normal((150, 3))
    expert = lift.LIFT.expert()
    with h5py.File(SAMPLE) as file:
        demo = file["data/demo_0"]
        seen = {key: demo[f"obs/{key}"][:] for key in ("robot0_eef_pos", "object")}
        recorded = demo["actions"][:]
    actions = [expert.act({key: seen[key][t] for key in seen}, noise[t]) for t in range(len(recorded))]
    np.testing.assert_array_equal(np.stack(actions), recorded)


# Stack.


@pytest.mark.parametrize("yaw", [-3.0, -1.2, 0.0, 0.7, 2.4])
def test_stack_sets_the_red_cube_on_the_green_one_and_lets_go(yaw: float) -> None:
    green = np.array([-0.02, -0.03, 0.825])
    arm = Arm([0.03, 0.04, 0.82], lambda red, turned: (red, turned, green, UPSIDE_DOWN, np.zeros(9)), yaw)
    assert follow(stack.PHASES, arm) == names_of(stack.PHASES)
    np.testing.assert_allclose(arm.thing - green, [0, 0, 0.045], atol=0.01)
    assert arm.at[2] > 0.95


@pytest.mark.parametrize("yaw", [-3.0, -1.2, 0.0, 0.7, 2.4])
def test_stack_grasps_two_faces_of_the_red_cube_away_from_the_green_one(yaw: float) -> None:
    red, green = np.array([0.03, 0.04, 0.82]), np.array([-0.02, -0.03, 0.825])
    arm = Arm(red, lambda red, turned: (red, turned, green, UPSIDE_DOWN, np.zeros(9)), yaw)
    follow([stack.PHASES[0]._replace(done=never)], arm)
    assert shortest(heading(arm.fingers()) - yaw, np.pi / 2) == pytest.approx(0, abs=0.02)
    assert abs(arm.fingers() @ (green - red)) / np.linalg.norm(green - red) < np.sin(np.pi / 4) + 0.02


# PickPlaceCan.


def after_pose(thing: np.ndarray, turned: np.ndarray) -> Sequence[np.ndarray]:
    return np.zeros(7), thing, turned


def test_the_can_is_let_go_in_its_quarter_of_the_other_bin() -> None:
    arm = Arm([0.2, -0.19, 0.86], after_pose)
    assert follow(pick_place_can.PHASES, arm) == names_of(pick_place_can.PHASES)
    x, y, z = arm.thing
    assert 0.1 + 0.03 < x < 0.295 - 0.03
    assert 0.28 + 0.03 < y < 0.525 - 0.03
    assert z == pytest.approx(pick_place_can.RELEASE_M, abs=0.03)
    assert arm.at[2] - z > 0.1


# NutAssemblySquare.


@pytest.mark.parametrize("yaw", np.arange(-3.0, 3.2, 0.5))
def test_the_nut_is_let_go_on_the_peg_with_its_faces_along_those_of_the_peg(yaw: float) -> None:
    arm = Arm([-0.11, 0.17, 0.83], after_pose, yaw, nut_assembly_square.HANDLE)
    assert follow(nut_assembly_square.PHASES, arm) == names_of(nut_assembly_square.PHASES)
    np.testing.assert_allclose(arm.thing, [*nut_assembly_square.PEG_XY, nut_assembly_square.RELEASE_M], atol=0.012)
    handle = rotation(arm.turned)[:, 0]
    assert shortest(heading(handle), np.pi / 2) == pytest.approx(0, abs=0.03)
    assert handle[0] < 0.5, "the handle points away from the robot"


# Door.


class PointDoor:
    """A door with a latch, as robosuite's model has it. Its handle follows the closed fingers of the arm."""

    def __init__(self, yaw: float) -> None:
        self.yaw, self.opened, self.pressed = yaw, 0.0, 0.0
        self.hinge = np.array([-0.2, -0.34, 1.1]) + self.turned(0.0) @ [0.255, 0.0, 0.0]
        self.arm = Arm([0.0, 0.0, 0.0])

    def turned(self, opened: float) -> np.ndarray:
        return rotation(about((0, 0, 1), self.yaw + opened))

    def centre(self) -> np.ndarray:
        return self.hinge - self.turned(self.opened) @ [0.255, 0.0, 0.0]

    def handle(self, opened: float, pressed: float) -> np.ndarray:
        lever = rotation(about((0, 1, 0), pressed)) @ [0.125, 0.0, 0.0]
        return self.hinge + self.turned(opened) @ (np.array([-0.175 - 0.255, -0.1, -0.025]) + lever)

    def obs(self) -> Obs:
        handle = self.handle(self.opened, self.pressed)
        self.arm.object_of = lambda *_: (self.centre(), handle, [self.opened], np.zeros(6), [self.pressed])
        return self.arm.obs()

    def step(self, action: np.ndarray) -> None:
        held = action[6] == CLOSED and np.linalg.norm(self.handle(self.opened, self.pressed) - self.arm.at) < 0.04
        self.arm.step(action)
        if held:
            free = self.pressed > 1.0
            nearby = [
                (opened, pressed)
                for opened in (np.clip(self.opened + np.linspace(-0.06, 0.06, 7), 0, 0.4) if free else [self.opened])
                for pressed in np.clip(self.pressed + np.linspace(-0.2, 0.2, 9), 0, 1.5)
            ]
            self.opened, self.pressed = min(nearby, key=lambda it: np.linalg.norm(self.handle(*it) - self.arm.at))


@pytest.mark.parametrize("yaw", [-3.14, -3.4])
def test_the_handle_is_pressed_before_the_door_is_pulled_open(yaw: float) -> None:
    world = PointDoor(yaw)
    assert follow(door.PHASES, world) == names_of(door.PHASES)
    assert world.opened > 0.3


@pytest.mark.parametrize(("opened", "pressed"), [(0.0, 0.0), (0.0, 0.8), (0.25, 1.2)])
def test_the_doors_yaw_and_handle_follow_from_the_obs(opened: float, pressed: float) -> None:
    world = PointDoor(-3.3)
    world.opened, world.pressed = opened, pressed
    found = door.door_of(world.obs())
    assert shortest(found.yaw - (-3.3 + opened), 2 * np.pi) == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(found.handle_at(0.39, 1.1), world.handle(0.39, 1.1), atol=1e-9)
