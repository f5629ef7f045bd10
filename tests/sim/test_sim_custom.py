"""Environments of the user's own: the form of a factory, the conventions of success, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from policies import SHAPES
from walk import Walk

from cache_pipeline.errors import ConfigError
from cache_pipeline.sim.custom import FactoryEnvironment, FactoryOpening, succeeded

WALK = Path(__file__).with_name("walk.py")
LOW_DIM = {"pose": (3,)}


def environment(env: Any) -> FactoryEnvironment:
    return FactoryEnvironment(env, FactoryOpening("mine.py:make", SHAPES, LOW_DIM))


@pytest.mark.parametrize(
    ("reward", "terminated", "info", "success"),
    [
        (0.0, False, {"is_success": 1.0}, True),  # gymnasium-robotics: a float
        (-1.0, False, {"is_success": np.float32(0)}, False),
        (0.0, True, {"is_success": False}, False),
        (1.0, True, {"is_success": False}, False),  # what info says counts
        (0.0, False, {"success": np.array([True])}, True),  # ManiSkill: an array
        (0.0, False, {"success": 0.0, "is_success": True}, True),
        (1.0, True, {}, True),
        (1.0, False, {}, False),
        (0.0, True, {}, False),
        (-1.0, True, {}, False),
    ],
)
def test_success_follows_the_conventions_of_the_field(
    reward: float, terminated: bool, info: dict, success: bool
) -> None:
    assert succeeded(reward, terminated, info) is success


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("gone.py:make", "there is no file gone.py for the environment"),
        ("no_such_module:make", "cannot import no_such_module for the environment"),
        (f"{WALK}:mak", "has no factory 'mak'.*did you mean make"),
        (str(WALK), "names no factory"),
        ("builtins:dict", r"returned a dict, which has no reset\(\); gymnasium's form is"),
    ],
)
def test_a_factory_that_cannot_be_used_is_named(reference: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FactoryOpening(reference, SHAPES, LOW_DIM).open()


def test_the_error_of_missing_obs_says_what_there_is() -> None:
    env = Walk()
    env._obs = lambda: {"front_image": np.zeros((8, 8, 3), np.uint8), "pos": np.zeros(3)}  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"mine.py:make has no obs 'wrist_image'.*available: front_image, pos"):
        environment(env).reset(0)


@pytest.mark.parametrize(
    ("obs", "message"),
    [
        (np.zeros(3), "the obs of mine.py:make are a ndarray, not a dict.*front_image, wrist_image, pose"),
        ({"front_image": np.zeros((3, 8, 8), np.uint8)}, r"front_image .* is uint8 \(3, 8, 8\).*uint8 \(8, 8, 3\)"),
        ({"front_image": np.zeros((8, 8, 3), np.float32)}, "is float32"),
        ({"pose": np.zeros(4)}, r"pose of mine.py:make has the shape \(4,\); the run needs \(3,\)"),
    ],
)
def test_obs_of_another_form_are_refused(obs: Any, message: str) -> None:
    env = Walk()
    env.reset(seed=0)
    if isinstance(obs, dict):
        obs = {**env._obs(), **obs}
    env._obs = lambda: obs  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=message):
        environment(env).reset(0)


def test_the_form_of_gym_before_gymnasium_is_refused() -> None:
    env: Any = Walk()
    reset, step = env.reset, env.step
    env.reset = lambda seed: reset(seed=seed)[0]
    with pytest.raises(ConfigError, match=r"reset of mine.py:make returned a dict, not \(obs, info\)"):
        environment(env).reset(0)
    env.reset, env.step = reset, lambda action: step(action)[:4]
    made = environment(env)
    made.reset(0)
    with pytest.raises(ConfigError, match="did not return five values"):
        made.step(np.zeros(3))


def test_actions_get_type_and_limits_of_the_action_space() -> None:
    env: Any = Walk()
    given: list[np.ndarray] = []
    step = env.step
    env.step = lambda action: given.append(action) or step(action)
    env.action_space = SimpleNamespace(shape=(3,), low=-np.ones(3), high=np.ones(3), dtype=np.dtype(np.float32))
    made = environment(env)
    made.reset(0)
    made.step(np.array([-7.0, 0.5, 7.0]))
    assert given[0].dtype == np.float32
    assert given[0].tolist() == [-1.0, 0.5, 1.0]
    with pytest.raises(ConfigError, match=r"takes actions of shape \(3,\), but the run's are \(7,\)"):
        made.step(np.zeros(7))


def test_an_environment_that_limits_its_episodes_says_so() -> None:
    env: Any = Walk()
    assert environment(env).horizon is None
    env.spec = SimpleNamespace(max_episode_steps=300)
    assert environment(env).horizon == 300
