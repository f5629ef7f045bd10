"""The real simulator: seeds, orientation, flags, a collected demo and a rollout. One environment serves most tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from policies import policy_of
from simulations import skip_without_simulator

from cache_pipeline.errors import ConfigError
from cache_pipeline.sim.collect import collect
from cache_pipeline.sim.collect_config import CollectConfig
from cache_pipeline.sim.config import RolloutConfig
from cache_pipeline.sim.environment import Environment
from cache_pipeline.sim.rollout import rollout
from cache_pipeline.sim.tasks.lift import LIFT

pytestmark = pytest.mark.sim
SAMPLE = Path(__file__).parents[2] / "data" / "lift_sample.hdf5"
EYE = "robot0_eye_in_hand_image"
SIZE = 48


@pytest.fixture(scope="module")
def recorded() -> dict:
    """env_args and render flags of the sample."""
    skip_without_simulator()
    with h5py.File(SAMPLE) as file:
        return {key: json.loads(file["data"].attrs[key]) for key in ("env_args", "render_flags")}


@pytest.fixture(scope="module")
def env(recorded: dict) -> Iterator[Environment]:
    cameras = {"agentview_image": (SIZE, 2 * SIZE), EYE: (SIZE, SIZE)}
    with Environment.from_env_args(recorded["env_args"], cameras, recorded["render_flags"]) as env:
        yield env


def play(env: Environment, seed: int, steps: int = 3) -> list[dict[str, np.ndarray]]:
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, env.action_dim))
    return [env.reset(seed), *(env.step(action).obs for action in actions)]


def test_an_episode_is_a_function_of_its_seed_whatever_came_before(env: Environment) -> None:
    first = play(env, 5)
    other = play(env, 6)
    again = play(env, 5)
    for one, two in zip(first, again, strict=True):
        assert one.keys() == two.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], two[key], err_msg=key)
    assert np.abs(first[0]["object"] - other[0]["object"]).max() > 1e-3
    assert np.abs(first[0]["robot0_joint_pos"] - other[0]["robot0_joint_pos"]).max() > 1e-3


def test_obs_have_robomimics_names_shapes_and_types(env: Environment) -> None:
    obs = env.reset(0)
    assert obs["agentview_image"].shape == (SIZE, 2 * SIZE, 3)
    assert obs[EYE].dtype == np.uint8
    shapes = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2, "robot0_joint_pos": 7, "object": 10}
    assert {key: len(obs[key]) for key in shapes} == shapes
    assert not [key for key in obs if "proprio" in key]


def test_images_are_upright_and_not_mirrored(env: Environment) -> None:
    """The cube's red pixels lie where a pinhole camera at the camera's pose sees the cube."""
    env.reset(1)
    for _ in range(5):
        obs = env.step(np.array([0.0, 1, 0, 0, 0, 0, -1])).obs
    red, green, blue = obs[EYE].astype(int).transpose(2, 0, 1)
    rows, columns = np.nonzero((red > 90) & (red > 2 * green) & (red > 2 * blue))
    row, column = project(env, "robot0_eye_in_hand", obs["object"][:3])
    assert min(abs(row - (SIZE - 1) / 2), abs(column - (SIZE - 1) / 2)) > 3
    assert (rows.mean(), columns.mean()) == pytest.approx((row, column), abs=1.5)


def project(env: Environment, camera: str, point: np.ndarray) -> tuple[float, float]:
    """Row and column at which a MuJoCo camera (looking along -z, y up) sees ``point``."""
    sim = env._task.sim
    index = sim.model.camera_name2id(camera)
    x, y, z = sim.data.cam_xmat[index].reshape(3, 3).T @ (point - sim.data.cam_xpos[index])
    focal = SIZE / 2 / np.tan(np.radians(sim.model.cam_fovy[index]) / 2)
    return (SIZE - 1) / 2 - focal * y / -z, (SIZE - 1) / 2 + focal * x / -z


def test_a_recorded_state_looks_as_it_was_recorded(env: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    with h5py.File(SAMPLE) as file:
        demo = file["data/demo_3"]
        monkeypatch.setattr(env, "cameras", {EYE: demo[f"obs/{EYE}"].shape[1:3]})
        obs = env.restore(demo["states"][0], demo.attrs["model_file"])
        np.testing.assert_allclose(obs["object"], demo["obs/object"][0], atol=1e-6)
        assert np.abs(obs[EYE].astype(int) - demo[f"obs/{EYE}"][0]).mean() < 1


def test_render_flags_change_the_image(env: Environment) -> None:
    plain = env.reset(1)["agentview_image"]
    flags = env._scene_flags
    env._scene_flags = dict.fromkeys(flags, True)
    try:
        shaded = env.reset(1)["agentview_image"]
    finally:
        env._scene_flags = flags
    assert (plain != shaded).any()
    np.testing.assert_array_equal(plain, env.reset(1)["agentview_image"])


def test_actions_are_clipped_to_the_limits(env: Environment) -> None:
    env.reset(0)
    beyond = env.step(np.full(7, 9.0)).obs["robot0_eef_pos"]
    env.reset(0)
    np.testing.assert_array_equal(beyond, env.step(np.ones(7)).obs["robot0_eef_pos"])


@pytest.mark.parametrize("action", [np.zeros(6), np.full(7, np.nan)])
def test_an_action_of_wrong_shape_or_nan_is_refused(env: Environment, action: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="7 finite numbers"):
        env.step(action)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"env_name": "Lfit"}, "did you mean Lift"),
        ({"type": 2}, "not a robosuite task"),
        ({"env_kwargs": {"robots": "Panda", "sped": 1}}, "does not take: sped"),
        ({"env_name": "PickPlaceCan", "env_kwargs": {"robots": "Panda", "sped": 1}}, "does not take: sped"),
    ],
)
def test_a_task_that_cannot_be_built_is_named(recorded: dict, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Environment.from_env_args({**recorded["env_args"], **change}, {})


@pytest.mark.parametrize(
    ("cameras", "flags", "message"),
    [
        ({"agentvew_image": (8, 8)}, {}, "did you mean agentview_image"),
        ({"agentview_image": (0, 8)}, {}, "0x8"),
        ({"agentview_image": (8, 8)}, {"shadw": False}, "did you mean shadow"),
    ],
)
def test_a_camera_or_flag_that_does_not_exist_is_named(
    env: Environment, cameras: dict, flags: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Environment(env._task, cameras, flags)


def test_motion_and_images_do_not_depend_on_the_images_left_out(env: Environment) -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (8, env.action_dim))
    found = []
    for every in (1, 4):
        env.reset(3)
        found.append([env.step(action, images=number % every == 0).obs for number, action in enumerate(actions)])
    for number, (full, spare) in enumerate(zip(*found, strict=True)):
        assert set(full) - set(spare) == (set() if number % 4 == 0 else set(env.cameras))
        for key, value in spare.items():
            np.testing.assert_array_equal(value, full[key], err_msg=f"{key} of step {number}")


def test_an_environment_of_an_earlier_robosuite_release_is_converted_with_a_warning(
    recorded: dict, caplog: pytest.LogCaptureFixture
) -> None:
    arm = {"type": "OSC_POSE", "input_max": 1, "input_min": -1, "output_max": [0.05] * 3 + [0.5] * 3}
    arm |= {"output_min": [-0.05] * 3 + [-0.5] * 3, "kp": 150, "damping": 1, "impedance_mode": "fixed"}
    arm |= {"kp_limits": [0, 300], "damping_limits": [0, 10], "uncouple_pos_ori": True, "control_delta": True}
    arm |= {"position_limits": None, "orientation_limits": None, "interpolation": None, "ramp_ratio": 0.2}
    kwargs = {"robots": ["Panda"], "controller_configs": arm, "camera_depths": False, "control_freq": 20}
    earlier = {**recorded["env_args"], "env_version": "1.2.0", "env_kwargs": kwargs}
    with Environment.from_env_args(earlier, {}) as env:
        before = env.reset(0)["robot0_eef_pos"]
        for _ in range(5):
            after = env.step(np.array([0.0, 0, 1, 0, 0, 0, -1])).obs["robot0_eef_pos"]
        assert after[2] - before[2] > 0.02
    assert "made with robosuite 1.2.0" in caplog.text


class Expert:
    """The scripted expert behind a policy's interface."""

    cameras = {"agentview_image": (24, 24, 3)}  # noqa: RUF012
    low_dim = {"robot0_eef_pos": (3,), "object": (10,)}  # noqa: RUF012
    obs_horizon = 2

    def __init__(self, recorded: dict) -> None:
        self.env_args, self.render_flags = recorded["env_args"], recorded["render_flags"]
        self.expert = LIFT.expert()

    def act(self, obs: dict[str, torch.Tensor]) -> torch.Tensor:
        assert obs["agentview_image"].shape == (1, 2, 24, 24, 3)
        now = {key: obs[key][0, -1].double().numpy() for key in self.low_dim}
        return torch.from_numpy(self.expert.act(now, np.zeros(3)))[None, None]


def test_the_expert_succeeds_in_a_rollout_and_is_filmed(recorded: dict, tmp_path: Path) -> None:
    config = RolloutConfig(run=Path("expert"), episodes=1, horizon=100, video=tmp_path, videos=1, device="cpu")
    result = rollout(config, progress=False, policy=Expert(recorded))
    assert (result.episodes, result.successes, result.success_rate) == (1, 1, 1.0)
    assert Path(result.records[0].video or "").name == "episode_000_success.mp4"
    assert Path(result.records[0].video or "").stat().st_size > 1000


def test_episodes_in_two_processes_are_those_of_one(recorded: dict, tmp_path: Path) -> None:
    policy = policy_of("flow", cameras={EYE: (24, 24)}, low_dim={"robot0_eef_pos": (3,), "object": (10,)}, dims=7)
    policy.env_args, policy.render_flags = recorded["env_args"], recorded["render_flags"]
    found = []
    for workers in (1, 2):
        config = RolloutConfig(
            run=Path("none"), episodes=3, horizon=5, workers=workers, video=tmp_path / str(workers), device="cpu"
        )
        result = rollout(config, progress=False, policy=policy)
        assert [episode.steps for episode in result.records] == [5, 5, 5]
        found.append([Path(episode.video or "").read_bytes() for episode in result.records])
    assert found[0] == found[1]
    assert len(set(found[0])) == 3


def test_collect_writes_the_demo_that_the_sample_holds(recorded: dict, tmp_path: Path) -> None:
    out = tmp_path / "one.hdf5"
    result = collect(CollectConfig(out=out, demos=1, seed=0), progress=False)
    assert (result.demos, result.attempts, result.bytes) == (1, 1, out.stat().st_size)
    assert list(tmp_path.iterdir()) == [out]
    with h5py.File(out) as file, h5py.File(SAMPLE) as sample:
        assert json.loads(file["data"].attrs["env_args"]) == recorded["env_args"]
        ours, theirs = file["data/demo_0"], sample["data/demo_0"]
        assert ours.attrs["model_file"] == theirs.attrs["model_file"]
        for name in ("actions", "states", "dones", "obs/object"):
            np.testing.assert_allclose(ours[name], theirs[name], atol=1e-3, err_msg=name)
        for camera in ("agentview_image", EYE):
            difference = np.abs(ours[f"obs/{camera}"][:].astype(int) - theirs[f"obs/{camera}"][:])
            assert difference.mean() < 1, camera
