"""Collecting and rendering again with the real simulator, in this process and in others that are killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from simulations import skip_without_simulator

from cache_pipeline.errors import ConfigError
from cache_pipeline.sim.collect import collect
from cache_pipeline.sim.collect_config import CollectConfig, RerenderConfig
from cache_pipeline.sim.env_args import read_env_args
from cache_pipeline.sim.environment import Environment
from cache_pipeline.sim.rerender import rerender

pytestmark = pytest.mark.sim
CAMERA = "agentview_image"
SIZE = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    skip_without_simulator()
    return tmp_path_factory.mktemp("collected")


@pytest.fixture(scope="module")
def with_images(folder: Path) -> Path:
    config = CollectConfig(out=folder / "images.hdf5", demos=2, cameras=(CAMERA,), image_size=SIZE)
    return collect(config, progress=False).out


@pytest.fixture(scope="module")
def low_dim(folder: Path) -> Path:
    return collect(CollectConfig(out=folder / "low_dim.hdf5", demos=2, cameras=()), progress=False).out


def arrays(path: Path) -> dict[str, np.ndarray]:
    """Path → values of every array."""
    found: dict[str, np.ndarray] = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found


def same(one: Path, other: Path) -> bool:
    mine, theirs = arrays(one), arrays(other)
    return mine.keys() == theirs.keys() and all(np.array_equal(mine[key], theirs[key]) for key in mine)


def test_states_rendered_again_give_the_images_of_the_simulation(with_images: Path, low_dim: Path) -> None:
    """An image shows the state beside it, and cameras do not change the motion."""
    out = low_dim.with_name("rendered.hdf5")
    result = rerender(RerenderConfig(source=low_dim, out=out, cameras=(CAMERA,), image_size=SIZE), progress=False)
    assert same(out, with_images)
    with h5py.File(out) as one, h5py.File(with_images) as other:
        assert dict(one["data"].attrs) == dict(other["data"].attrs)
    assert result.images == result.steps


def start(*words: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "cache_pipeline", "--quiet", *map(str, words)], start_new_session=True
    )


def wait_for_parts(process: subprocess.Popen[bytes], folder: Path, count: int) -> None:
    while len(list(folder.glob(".*.parts/part_*"))) < count:
        assert process.poll() is None, "the process ended too early"
        time.sleep(0.01)


def test_two_processes_that_are_killed_and_one_that_goes_on_make_the_same_file(low_dim: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.hdf5"
    words = ["collect", "--out", out, "--demos", 2, "--cameras", "none", "--workers", 2]
    process = start(*words)
    wait_for_parts(process, tmp_path, 1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    collect(CollectConfig(out=out, demos=2, cameras=()), progress=False)
    assert same(out, low_dim)
    assert [path.name for path in tmp_path.iterdir()] == ["x.hdf5"]


@pytest.fixture(scope="module")
def env(low_dim: Path) -> Iterator[Environment]:
    env_args = read_env_args(low_dim)
    with Environment.from_env_args(env_args.env_args, {CAMERA: (48, 48)}, env_args.render_flags) as env:
        yield env


def earlier_release(model_xml: str) -> str:
    """The model as robosuite 1.2 named it: other names of the gripper, a mesh that is gone; a cube of another size."""
    model = model_xml.replace("gripper0_right_", "gripper0_").replace("link0_vis_0.obj", "link0_vis.stl")
    model, count = re.subn(r'(name="cube_g0(_vis)?" size=)"[^"]*"', r'\1"0.06 0.06 0.06"', model)
    assert count == 2
    return model


def red(image: np.ndarray) -> int:
    channels = image.astype(int)
    return int(((channels[..., 0] > 90) & (channels[..., 0] > 2 * channels[..., 1])).sum())


def test_a_model_of_an_earlier_release_is_fitted_to_the_installed_one(env: Environment, low_dim: Path) -> None:
    with h5py.File(low_dim) as file:
        demo = file["data/demo_0"]
        state, model, cube = demo["states"][0], demo.attrs["model_file"], demo["obs/object"][0]
    plain = env.restore(state, model)
    assert not env.fitted
    old = env.restore(state, earlier_release(model))
    assert env.fitted
    np.testing.assert_allclose(old["object"][:3], cube[:3], atol=1e-6)
    np.testing.assert_allclose(old["robot0_eef_pos"], plain["robot0_eef_pos"], atol=1e-6)
    assert red(old[CAMERA]) > 2 * red(plain[CAMERA]) > 0
    assert env.step(np.zeros(env.action_dim)).obs[CAMERA].shape == (48, 48, 3)
    again = env.restore(state, model)[CAMERA]
    assert np.abs(again.astype(int) - plain[CAMERA]).max() <= 1, "numbers in XML have 6 digits"


def test_an_environment_starts_with_the_model_that_env_args_names(env: Environment, low_dim: Path) -> None:
    """So rollouts render as the images that were rendered again."""
    env_args: dict[str, Any] = read_env_args(low_dim).env_args
    model = earlier_release(env.model_xml())
    with Environment.from_env_args({**env_args, "model_file": model}, {CAMERA: (48, 48)}, env.render_flags) as other:
        large = other.reset(5)
        assert red(large[CAMERA]) > 2 * red(env.reset(5)[CAMERA]) > 0
        np.testing.assert_array_equal(large[CAMERA], other.reset(5)[CAMERA])


def test_states_and_models_of_another_task_are_refused(env: Environment, low_dim: Path) -> None:
    with pytest.raises(ConfigError, match=r"takes states of 32 numbers, not of shape \(45,\)"):
        env.restore(np.zeros(45))
    other = earlier_release(env.model_xml()).replace("cube_joint0", "can_joint0")
    with pytest.raises(ConfigError, match="robosuite 10: can_joint0 is cube_joint0 there; env_args must name the task"):
        env.restore(np.zeros(32), other)


def test_the_model_of_an_episode_has_the_poses_that_the_task_drew(folder: Path, low_dim: Path) -> None:
    """Door moves the frame of the door, which has no joint, so no state holds its place."""
    recorded = read_env_args(low_dim)
    with Environment.from_env_args({**recorded.env_args, "env_name": "Door"}, {}) as env:
        first, model = env.reset(1), env.model_xml()
        state = env.state()
        second = env.reset(2)
        assert np.abs(first["object"] - second["object"]).max() > 1e-3
        assert env.model_xml() != model
        for _ in range(2):
            np.testing.assert_allclose(env.restore(state, model)["object"], first["object"], atol=1e-6)
        assert not env.fitted
        assert env.model_xml() == model
        np.testing.assert_allclose(env.reset(2)["object"], second["object"], atol=1e-6)


def test_an_unknown_camera_is_named_and_nothing_is_left(low_dim: Path, tmp_path: Path) -> None:
    config = RerenderConfig(source=low_dim, out=tmp_path / "x.hdf5", cameras=("agentvew_image",))
    with pytest.raises(ConfigError, match="did you mean agentview_image"):
        rerender(config, progress=False)
    assert list(tmp_path.iterdir()) == []
