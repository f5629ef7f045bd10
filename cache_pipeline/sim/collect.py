"""Collects scripted demos in simulation and writes them in robomimic's HDF5 layout."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from cache_pipeline.errors import CachePipelineError, ConfigError, available, counted
from cache_pipeline.files import FileKind, check_output, output_file
from cache_pipeline.hdf5 import group_attributes, holds_hdf5, new_hdf5
from cache_pipeline.progress import Progress
from cache_pipeline.sim.environment import (
    FAST_RENDER_FLAGS,
    IMAGE_SUFFIX,
    ROBOSUITE_ENV_TYPE,
    Environment,
    Obs,
)
from cache_pipeline.sim.opengl import load_robosuite
from cache_pipeline.sim.tasks.registry import TASKS
from cache_pipeline.sim.tasks.task import Task

HOLD_STEPS = 5
"""A demo ends after this many consecutive successful steps."""
ATTEMPTS_PER_DEMO = 5
"""Largest number of failed episodes per requested demo before collecting stops with an error."""


def _is_dataset(path: Path) -> bool:
    return holds_hdf5(path) and group_attributes(path) is not None


DATASET = FileKind("a dataset", _is_dataset)


class CollectError(CachePipelineError, RuntimeError):
    """The scripted expert fails too often."""


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Options of ``collect``."""

    out: Path
    """The HDF5 file to write, atomically."""
    task: str = "Lift"
    demos: int = 100
    seed: int = 0
    cameras: tuple[str, ...] = ("agentview_image", "robot0_eye_in_hand_image")
    """rgb obs keys: robosuite's camera names with ``_image``."""
    image_size: int = 84
    """(H, W) of every image, in pixels."""
    render_flags: Mapping[str, bool] = field(default_factory=lambda: dict(FAST_RENDER_FLAGS))
    """MuJoCo scene flags that differ from the defaults; recorded in the file and used by rollouts."""
    horizon: int | None = None
    """An episode that takes more steps has failed; by default as many as the task says."""
    noise: float = 0.1
    """Standard deviation of Gaussian noise on the expert's displacement, as a fraction of the action limits."""
    valid_fraction: float = 0.1
    """Fraction of the demos in the filter key ``valid``; at least one demo if there are two or more."""
    gzip_level: int = 9
    frames_per_chunk: int = 16
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ConfigError(f"there is no scripted expert for the task {self.task!r}; {available(TASKS, self.task)}")
        for name in ("demos", "image_size", "horizon", "frames_per_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; give at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; give 0 or more")
        if self.noise < 0:
            raise ConfigError(f"noise is {self.noise}; give 0 or more")
        if not 0 <= self.valid_fraction < 1:
            raise ConfigError(f"valid_fraction is {self.valid_fraction}; give 0 or more, but less than 1")
        if not 0 <= self.gzip_level <= 9:
            raise ConfigError(f"gzip_level is {self.gzip_level}; give 0 to 9")
        for camera in self.cameras:
            if not camera.endswith(IMAGE_SUFFIX):
                raise ConfigError(f"camera {camera!r} is not an rgb obs key; did you mean {camera}{IMAGE_SUFFIX}?")

    def of_task(self) -> Task:
        """Returns the task, with ``horizon`` in place of its own if given."""
        task = TASKS[self.task]
        return task if self.horizon is None else replace(task, horizon=self.horizon)


class CollectResult(NamedTuple):
    """Path, counts and time of a collected file."""

    out: Path
    demos: int
    attempts: int
    steps: int
    seconds: float
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "out": str(self.out)}

    def lines(self) -> list[str]:
        """Returns the result as lines for a terminal."""
        megabytes = self.bytes / 1e6
        demos = counted(self.demos, "demo")
        return [
            f"{self.out}: {demos} of {self.attempts} attempts, {self.steps} steps, {megabytes:.1f} MB, "
            f"in {self.seconds:.0f} s"
        ]


class RecordedDemo(NamedTuple):
    """T steps. Obs and states at t precede ``actions[t]``; rewards and dones at t follow it."""

    obs: dict[str, NDArray]
    actions: NDArray[np.float64]
    rewards: NDArray[np.float64]
    dones: NDArray[np.int64]
    states: NDArray[np.float64]
    model_xml: str
    success: bool


def collect(config: CollectConfig, *, progress: bool = True) -> CollectResult:
    """Runs the expert until ``demos`` episodes have succeeded, and writes these episodes.

    The content of the file depends only on the config and the versions of simulator and renderer.

    Raises:
        ConfigError: the file exists and ``overwrite`` is off, or a camera or flag does not exist.
        CollectError: too few episodes succeed.
        MissingExtraError, OpenGLError: the simulation cannot run on this machine.
    """
    check_output(config.out, DATASET, overwrite=config.overwrite)
    started = time.monotonic()
    env_args = make_env_args(config)
    size = (config.image_size, config.image_size)
    attempts = steps = written = 0
    with ExitStack() as stack:
        cameras = dict.fromkeys(config.cameras, size)
        env = stack.enter_context(Environment.from_env_args(env_args, cameras, config.render_flags))
        partial = stack.enter_context(output_file(config.out, DATASET, overwrite=config.overwrite))
        file, check_written = stack.enter_context(new_hdf5(partial))
        bar = stack.enter_context(Progress("collect", config.demos, "demos")) if progress else None
        data = file.create_group("data")
        while written < config.demos:
            if attempts - written >= ATTEMPTS_PER_DEMO * config.demos:
                raise CollectError(_gave_up(config, attempts, written))
            demo = record_demo(env, config, attempt=attempts)
            attempts += 1
            if demo.success:
                write_demo(data.create_group(f"demo_{written}"), demo, config)
                check_written()
                written, steps = written + 1, steps + len(demo.actions)
                if bar is not None:
                    bar.advance(steps=steps)
        data.attrs["env_args"] = json.dumps(env_args, indent=4)
        data.attrs["render_flags"] = json.dumps(dict(config.render_flags))
        data.attrs["total"] = steps
        write_masks(file, config)
    seconds = time.monotonic() - started
    return CollectResult(config.out, written, attempts, steps, seconds, config.out.stat().st_size)


def make_env_args(config: CollectConfig) -> dict[str, Any]:
    """Returns the ``env_args`` of a collected file: the task, a Panda and robosuite's default controller for it."""
    robosuite = load_robosuite()
    task = config.of_task()
    return {
        "env_name": task.env_name,
        "type": ROBOSUITE_ENV_TYPE,
        "env_version": robosuite.__version__,
        "env_kwargs": {
            "robots": "Panda",
            "controller_configs": robosuite.load_composite_controller_config(robot="Panda"),
            "has_renderer": False,
            "has_offscreen_renderer": bool(config.cameras),
            "use_camera_obs": bool(config.cameras),
            "reward_shaping": False,
            "control_freq": 20,
            "ignore_done": True,
            "horizon": task.rollout_horizon,
            "camera_names": [camera.removesuffix(IMAGE_SUFFIX) for camera in config.cameras],
            "camera_heights": config.image_size,
            "camera_widths": config.image_size,
            **task.env_kwargs,
        },
    }


def record_demo(env: Environment, config: CollectConfig, *, attempt: int) -> RecordedDemo:
    """Runs the expert for one episode, which depends only on (config.seed, attempt)."""
    episode_seed, noise_seed = np.random.SeedSequence([config.seed, attempt]).generate_state(2)
    task = config.of_task()
    noise = config.noise * np.random.default_rng(noise_seed).standard_normal((task.horizon, 3))
    expert = task.expert()
    obs = env.reset(int(episode_seed))
    model_xml = env.model_xml()
    held = 0
    seen: list[Obs] = []
    rows: list[tuple[NDArray, NDArray, float, bool]] = []
    while len(rows) < task.horizon and held < HOLD_STEPS:
        action = expert.act(obs, noise[len(rows)])
        state = env.state()
        seen.append({key: obs[key] for key in (*config.cameras, *task.low_dim_keys)})
        obs, reward, success = env.step(action)
        rows.append((state, action, reward, success))
        held = held + 1 if success else 0
    states, actions, rewards, dones = zip(*rows, strict=True)
    return RecordedDemo(
        obs={key: np.stack([step[key] for step in seen]) for key in seen[0]},
        actions=np.stack(actions),
        rewards=np.array(rewards, dtype=np.float64),
        dones=np.array(dones, dtype=np.int64),
        states=np.stack(states),
        model_xml=model_xml,
        success=held == HOLD_STEPS,
    )


def write_demo(group: h5py.Group, demo: RecordedDemo, config: CollectConfig) -> None:
    """Writes one demo into ``data/<demo>``."""
    for key, values in demo.obs.items():
        if key not in config.cameras:
            group.create_dataset(f"obs/{key}", data=values)
            continue
        chunk = (min(config.frames_per_chunk, len(values)), *values.shape[1:])
        group.create_dataset(
            f"obs/{key}", data=values, chunks=chunk, compression="gzip", compression_opts=config.gzip_level
        )
    for name in ("actions", "rewards", "dones", "states"):
        group.create_dataset(name, data=getattr(demo, name))
    group.attrs["num_samples"] = len(demo.actions)
    group.attrs["model_file"] = demo.model_xml


def write_masks(file: h5py.File, config: CollectConfig) -> None:
    """Writes the filter keys ``train`` and ``valid``, drawn from the seed; omits ``valid`` if it is empty."""
    count = round(config.valid_fraction * config.demos)
    if config.valid_fraction > 0 and config.demos > 1:
        count = max(count, 1)
    order = np.random.default_rng(np.random.SeedSequence([config.seed, config.demos])).permutation(config.demos)
    for key, members in (("valid", order[:count]), ("train", order[count:])):
        if len(members):
            names = np.array([f"demo_{index}" for index in sorted(members)], dtype="S")
            file.create_dataset(f"mask/{key}", data=names)


def _gave_up(config: CollectConfig, attempts: int, written: int) -> str:
    return (
        f"{config.out} was not written: only {written} of {attempts} episodes of {config.task} succeeded within "
        f"{config.of_task().horizon} steps; raise horizon or lower noise in CollectConfig"
    )
