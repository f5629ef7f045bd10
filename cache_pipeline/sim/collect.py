"""Collects scripted demos in simulation and writes them in robomimic's HDF5 layout."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from cache_pipeline import __version__
from cache_pipeline.errors import CachePipelineError, counted
from cache_pipeline.files import atomic_path, check_output, write_json
from cache_pipeline.hdf5 import new_hdf5
from cache_pipeline.progress import Progress
from cache_pipeline.sim.collect_config import IMAGE_SUFFIX, CollectConfig, FileConfig
from cache_pipeline.sim.demo_file import DATASET, DEMO, RecordedDemo, write_demo, write_mask
from cache_pipeline.sim.environment import ROBOSUITE_ENV_TYPE, Environment, Obs
from cache_pipeline.sim.opengl import load_robosuite
from cache_pipeline.sim.parts import Parts, part_path, parted_file
from cache_pipeline.sim.pool import make_units
from cache_pipeline.sim.tasks.registry import TASKS
from cache_pipeline.sim.tasks.task import Task

HOLD_STEPS = 5
"""A demo ends after this many consecutive successful steps."""
ATTEMPTS_PER_DEMO = 5
"""Largest number of failed attempts per requested demo before collecting stops with an error."""


class CollectError(CachePipelineError, RuntimeError):
    """The scripted expert fails too often."""


class CollectResult(NamedTuple):
    """Path, counts and time of a collected file; ``failed`` attempts are left out of it."""

    out: Path
    demos: int
    attempts: int
    failed: int
    steps: int
    seconds: float
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "out": str(self.out)}

    def lines(self) -> list[str]:
        """Returns the result as lines for a terminal."""
        failed = f", {self.failed} failed and left out" if self.failed else ""
        return [
            f"{self.out}: {counted(self.demos, 'demo')} of {counted(self.attempts, 'attempt')}{failed}; "
            f"{self.steps} steps, {self.bytes / 1e6:.1f} MB, in {self.seconds:.0f} s"
        ]


def collect(config: CollectConfig, *, progress: bool = True) -> CollectResult:
    """Runs the expert until ``demos`` attempts have succeeded, and writes these attempts.

    The content of the file depends only on the config and the versions of simulator and renderer, not on the number of
    processes. An interrupted command keeps its finished attempts; the same command goes on with them.

    Raises:
        ConfigError: the file exists and ``overwrite`` is off, or a camera or flag does not exist.
        CollectError: too few attempts succeed.
        MissingExtraError, OpenGLError: the simulation cannot run on this machine.
        WorkerDiedError: a worker process was killed or crashed.
    """
    check_output(config.out, DATASET, overwrite=config.overwrite)
    started = time.monotonic()
    env_args = make_env_args(config)
    identity = make_identity(config, env_args)
    with parted_file(config.out, DATASET, identity, "attempt", overwrite=config.overwrite) as parts:
        finished = {number: suffix == "hdf5" for number, suffix in parts.finished().items()}
        with ExitStack() as stack:
            bar = None
            if progress:
                already = min(sum(finished.values()), config.demos)
                bar = stack.enter_context(Progress("collect", config.demos, "demos", already))
            attempts = Attempts(config.demos, finished, bar)
            make_units(Recording(config, env_args, parts.folder), attempts, config.workers)
        chosen, count = attempts.chosen()
        if len(chosen) < config.demos:
            parts.clear()  # they would fail again
            raise CollectError(_gave_up(config, count, len(chosen)))
        steps = _write(parts, config, env_args, chosen, count)
    seconds, size = time.monotonic() - started, config.out.stat().st_size
    return CollectResult(config.out, len(chosen), count, count - len(chosen), steps, seconds, size)


def task_of(config: CollectConfig) -> Task:
    """Returns the task, with ``horizon`` in place of its own if given."""
    task = TASKS[config.task]
    return task if config.horizon is None else replace(task, horizon=config.horizon)


def make_env_args(config: CollectConfig) -> dict[str, Any]:
    """Returns the ``env_args`` of a collected file: the task, a Panda and robosuite's default controller for it."""
    robosuite = load_robosuite()
    task = task_of(config)
    return {
        "env_name": task.env_name,
        "type": ROBOSUITE_ENV_TYPE,
        "env_version": robosuite.__version__,
        "env_kwargs": {
            "robots": "Panda",
            "controller_configs": robosuite.load_composite_controller_config(robot="Panda"),
            "has_renderer": False,
            "reward_shaping": False,
            "control_freq": 20,
            "ignore_done": True,
            "horizon": task.rollout_horizon,
            **camera_kwargs(config),
            **task.env_kwargs,
        },
    }


def camera_kwargs(config: FileConfig) -> dict[str, Any]:
    """Returns the part of robosuite's ``env_kwargs`` that describes the cameras of a file."""
    return {
        "has_offscreen_renderer": bool(config.cameras),
        "use_camera_obs": bool(config.cameras),
        "camera_names": [camera.removesuffix(IMAGE_SUFFIX) for camera in config.cameras],
        "camera_heights": config.image_size,
        "camera_widths": config.image_size,
    }


def make_identity(config: CollectConfig, env_args: dict[str, Any]) -> dict[str, Any]:
    """Returns what decides an attempt, beside its number. The number of demos and the filter keys do not."""
    names = ("task", "seed", "noise", "image_size", "gzip_level", "frames_per_chunk", "next_obs")
    return {
        **{name: getattr(config, name) for name in names},
        "cameras": list(config.cameras),
        "render_flags": config.flags,
        "horizon": task_of(config).horizon,
        "env_args": env_args,
        **simulator_versions(),
    }


def simulator_versions() -> dict[str, Any]:
    """Returns the versions of what simulates and renders; None if it is not installed."""
    found: dict[str, Any] = {"cache_pipeline": __version__, "opengl": os.environ.get("MUJOCO_GL")}
    for package in ("mujoco", "robosuite"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


class Attempt(NamedTuple):
    """One attempt of the expert; it depends only on the config's seed and this number."""

    number: int

    def __str__(self) -> str:
        return f"attempt {self.number}"


class Attempts:
    """Hands out the attempts in order, no more at a time than demos are missing: none is in vain unless one fails.

    So the demos are the first attempts that succeed, in however many processes they are made.

    Args:
        demos: number of attempts that must succeed.
        finished: number → success of the attempts that were made before.
        bar: shows the progress.
    """

    def __init__(self, demos: int, finished: dict[int, bool], bar: Progress | None = None) -> None:
        self._demos, self._finished, self._bar = demos, dict(finished), bar
        self._running: set[int] = set()

    def chosen(self) -> tuple[list[int], int]:
        """Returns the numbers of the first attempts that succeeded, and how many attempts were made up to the last."""
        successes: list[int] = []
        number = 0
        most = ATTEMPTS_PER_DEMO * self._demos
        while number in self._finished and len(successes) < self._demos and number - len(successes) < most:
            if self._finished[number]:
                successes.append(number)
            number += 1
        return successes, number

    def next(self) -> Attempt | None:
        successes, number = self.chosen()
        if number - len(successes) >= ATTEMPTS_PER_DEMO * self._demos:
            return None
        hoped = len(successes)
        while hoped < self._demos and (number in self._finished or number in self._running):
            hoped += self._finished.get(number, True)
            number += 1
        if hoped >= self._demos:
            return None
        self._running.add(number)
        return Attempt(number)

    def done(self, unit: Attempt, result: bool) -> None:
        self._running.remove(unit.number)
        self._finished[unit.number] = result
        if self._bar is not None:
            self._bar.advance(int(result), failed=sum(not success for success in self._finished.values()))


class Recording(NamedTuple):
    """Makes attempts and writes each as a part in a folder."""

    config: CollectConfig
    env_args: dict[str, Any]
    folder: Path

    @contextmanager
    def open(self) -> Iterator[Callable[[Attempt], bool]]:
        with Environment.from_env_args(self.env_args, self.config.sizes, self.config.flags) as env:
            yield partial(self.record, env)

    def record(self, env: Environment, attempt: Attempt) -> bool:
        """Writes the part of an attempt; returns whether it succeeded."""
        demo = record_demo(env, self.config, attempt=attempt.number)
        if not demo.success:
            write_json(part_path(self.folder, attempt.number, "json"), {"steps": len(demo.actions)})
            return False
        with (
            atomic_path(part_path(self.folder, attempt.number)) as path,
            new_hdf5(path) as (file, _),
        ):
            write_demo(file.create_group(DEMO), demo, self.config)
        return True


def record_demo(env: Environment, config: CollectConfig, *, attempt: int) -> RecordedDemo:
    """Runs the expert for one episode, which depends only on (config.seed, attempt)."""
    episode_seed, noise_seed = np.random.SeedSequence([config.seed, attempt]).generate_state(2)
    task = task_of(config)
    noise = config.noise * np.random.default_rng(noise_seed).standard_normal((task.horizon, 3))
    expert = task.expert()
    obs = env.reset(int(episode_seed))
    model_xml = env.model_xml()
    held = 0
    keys = (*config.cameras, *task.low_dim_keys)
    seen: list[Obs] = [{key: obs[key] for key in keys}]
    rows: list[tuple[NDArray, NDArray, float, bool]] = []
    while len(rows) < task.horizon and held < HOLD_STEPS:
        action = expert.act(obs, noise[len(rows)])
        state = env.state()
        obs, reward, success = env.step(action)
        seen.append({key: obs[key] for key in keys})
        rows.append((state, action, reward, success))
        held = held + 1 if success else 0
    states, actions, rewards, dones = zip(*rows, strict=True)
    return RecordedDemo(
        obs={key: np.stack([step[key] for step in seen[:-1]]) for key in keys},
        actions=np.stack(actions),
        rewards=np.array(rewards, dtype=np.float64),
        dones=np.array(dones, dtype=np.int64),
        states=np.stack(states),
        model_xml=model_xml,
        success=held == HOLD_STEPS,
        next_obs={key: np.stack([step[key] for step in seen[1:]]) for key in keys} if config.next_obs else None,
    )


def _write(parts: Parts, config: CollectConfig, env_args: dict[str, Any], chosen: Sequence[int], attempts: int) -> int:
    """Writes the file from the parts of the chosen attempts; returns the number of steps."""
    steps = 0
    with new_hdf5(parts.file) as (file, check_written):
        data = file.create_group("data")
        for index, number in enumerate(chosen):
            with h5py.File(parts.path(number), "r") as part:
                part.copy(DEMO, data, f"demo_{index}")
                steps += int(part[DEMO].attrs["num_samples"])
            check_written()
        data.attrs["env_args"] = json.dumps(env_args, indent=4)
        data.attrs["render_flags"] = json.dumps(config.flags)
        data.attrs["total"] = steps
        data.attrs["attempts"], data.attrs["failed_attempts"] = attempts, attempts - len(chosen)
        write_masks(file, config)
    return steps


def write_masks(file: h5py.File, config: CollectConfig) -> None:
    """Writes the filter keys ``train`` and ``valid``, drawn from the seed; omits ``valid`` if it is empty."""
    count = round(config.valid_fraction * config.demos)
    if config.valid_fraction > 0 and config.demos > 1:
        count = max(count, 1)
    order = np.random.default_rng(np.random.SeedSequence([config.seed, config.demos])).permutation(config.demos)
    for key, members in (("valid", order[:count]), ("train", order[count:])):
        if len(members):
            write_mask(file, key, (f"demo_{index}" for index in sorted(members)))


def _gave_up(config: CollectConfig, attempts: int, written: int) -> str:
    return (
        f"{config.out} was not written: only {written} of {attempts} attempts of {config.task} succeeded within "
        f"{task_of(config).horizon} steps; give a larger --horizon or less --noise"
    )
