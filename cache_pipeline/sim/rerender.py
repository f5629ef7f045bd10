"""Renders the recorded states of a dataset: low-dim files become image datasets, images get another size or look."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from cache_pipeline.demos.layouts.protocol import demo_order
from cache_pipeline.errors import ConfigError, DatasetError, counted
from cache_pipeline.files import atomic_path, check_output, digest
from cache_pipeline.hdf5 import damage_as_error, new_hdf5, open_file
from cache_pipeline.isolation import isolated
from cache_pipeline.isolation import progress as made_progress
from cache_pipeline.progress import Progress, logger
from cache_pipeline.sim.collect import camera_kwargs, simulator_versions
from cache_pipeline.sim.collect_config import FAST_RENDER_FLAGS, RerenderConfig
from cache_pipeline.sim.demo_file import DATASET, DEMO, write_images
from cache_pipeline.sim.env_args import EnvArgs, read_env_args
from cache_pipeline.sim.environment import Environment
from cache_pipeline.sim.opengl import load_robosuite
from cache_pipeline.sim.parts import Parts, part_path, parted_file
from cache_pipeline.sim.pool import make_units
from cache_pipeline.text import listed

OBS = ("obs", "next_obs")


class RerenderResult(NamedTuple):
    """Path, counts and time of a file with new images."""

    out: Path
    demos: int
    steps: int
    images: int
    seconds: float
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "out": str(self.out)}

    def lines(self) -> list[str]:
        """Returns the result as lines for a terminal."""
        return [
            f"{self.out}: {counted(self.demos, 'demo')}, {self.steps} steps, {counted(self.images, 'image')}, "
            f"{self.bytes / 1e6:.1f} MB, in {self.seconds:.0f} s"
        ]


class SourceDemo(NamedTuple):
    """One demo of the source: its name, its number of steps, its obs that are images, and the digest of its model."""

    name: str
    steps: int
    images: tuple[str, ...]
    model: str


def rerender(config: RerenderConfig, *, progress: bool = True) -> RerenderResult:
    """Writes a copy of a dataset whose images are rendered from its states.

    All else is copied as it is, but for other images, which may have been rendered otherwise, and for the attributes
    ``env_args`` and ``render_flags``, which describe the new images. Flags that the source records are kept, unless
    the config changes them.

    Raises:
        ConfigError: the file exists and ``overwrite`` is off; a camera, flag or task does not exist; or the states are
            those of another task.
        DatasetError: the source cannot be read, or has no states.
        MissingExtraError, OpenGLError: the simulation cannot run on this machine.
        WorkerDiedError: a worker process was killed or crashed.
    """
    check_output(config.out, DATASET, overwrite=config.overwrite, sources=(config.source,))
    started = time.monotonic()
    with damage_as_error(config.source):
        demos = isolated(_scan, config.source)
    recorded = source_env_args(config)
    flags = {**(recorded.render_flags or FAST_RENDER_FLAGS), **config.render_flags}
    load_robosuite()
    _tell_of_images(config, demos)
    identity = make_identity(config, recorded.env_args, flags)
    with parted_file(
        config.out, DATASET, identity, "demo", overwrite=config.overwrite, sources=(config.source,)
    ) as parts:
        with ExitStack() as stack:
            bar = stack.enter_context(Progress("render", len(demos), "demos")) if progress else None
            states = States(config.source, demos, parts, bar)
            several = len({demo.model for demo in demos}) > 1
            make_units(Rendering(config, recorded.env_args, flags, several, parts.folder), states, config.workers)
        attributes = new_attributes(config, recorded.env_args, flags, states.fitted_model)
        with damage_as_error(config.source):
            isolated(_write, config.source, parts, [demo.name for demo in demos], config.cameras, attributes)
    steps = sum(demo.steps for demo in demos)
    seconds, size = time.monotonic() - started, config.out.stat().st_size
    return RerenderResult(config.out, len(demos), steps, steps * len(config.cameras), seconds, size)


def source_env_args(config: RerenderConfig) -> EnvArgs:
    """Returns the environment of ``config.env_args``, else of the source."""
    if config.env_args is not None:
        return read_env_args(config.env_args)
    try:
        return read_env_args(config.source)
    except ConfigError as error:
        raise ConfigError(
            f"{config.source} has no env_args, so its environment is unknown; "
            "give --env-args FILE: a JSON file, or a dataset with env_args"
        ) from error


def make_identity(config: RerenderConfig, env_args: Mapping[str, Any], flags: Mapping[str, bool]) -> dict[str, Any]:
    """Returns what decides the images of a demo, beside its states and model, whose digest each part has."""
    return {
        "image_size": config.image_size,
        "cameras": list(config.cameras),
        "render_flags": dict(flags),
        "gzip_level": config.gzip_level,
        "frames_per_chunk": config.frames_per_chunk,
        "env_args": dict(env_args),
        **simulator_versions(),
    }


def new_attributes(
    config: RerenderConfig, env_args: Mapping[str, Any], flags: Mapping[str, bool], model_xml: str | None
) -> dict[str, str]:
    """Returns the attributes of ``data`` that describe the images, so that rollouts render the same.

    Args:
        model_xml: a model of another robosuite release, whose lights and materials the images show.
    """
    kwargs = {**env_args.get("env_kwargs", {}), **camera_kwargs(config)}
    model = {} if model_xml is None else {"model_file": model_xml}
    return {
        "env_args": json.dumps({**env_args, "env_kwargs": kwargs, **model}, indent=4),
        "render_flags": json.dumps(dict(flags)),
    }


def _tell_of_images(config: RerenderConfig, demos: Sequence[SourceDemo]) -> None:
    left_out = sorted({image for demo in demos for image in demo.images} - {f"obs/{key}" for key in config.cameras})
    if left_out:
        logger.warning(
            "%s of %s left out, since they may be rendered otherwise; --cameras names those to render",
            listed(left_out),
            f"{config.source} {'is' if len(left_out) == 1 else 'are'}",
        )


def _scan(path: Path) -> list[SourceDemo]:
    """Returns the demos of a file, in order. Runs in the child process.

    Raises:
        DatasetError: it is no dataset, or a demo has no states.
    """
    with open_file(path) as file:
        data = file.get("data")
        if not isinstance(data, h5py.Group) or not len(data):
            raise DatasetError(f"{path} has no demos in a group 'data' (it holds {listed(file) or 'nothing'})")
        return [_scan_demo(path, name, data[name]) for name in sorted(data, key=demo_order)]


def _scan_demo(path: Path, name: str, group: Any) -> SourceDemo:
    made_progress()
    states = group.get("states") if isinstance(group, h5py.Group) else None
    if not isinstance(states, h5py.Dataset) or states.ndim != 2:
        there = listed(group) if isinstance(group, h5py.Group) else "no group"
        raise DatasetError(
            f"{path}: {name} has no states of the simulator, only {there}; --from-states needs data/<demo>/states"
        )
    actions = group.get("actions")
    if isinstance(actions, h5py.Dataset) and len(actions) != len(states):
        raise DatasetError(f"{path}: {name} has {len(states)} states, but {len(actions)} actions; each step needs both")
    groups = {obs: group.get(obs) for obs in OBS}
    images = [
        f"{obs}/{key}"
        for obs, found in groups.items()
        if isinstance(found, h5py.Group)
        for key, item in found.items()
        if _is_image(item)
    ]
    return SourceDemo(name, len(states), tuple(images), digest(_model_xml(group).encode()))


def _is_image(item: Any) -> bool:
    return isinstance(item, h5py.Dataset) and item.dtype == np.uint8 and item.ndim == 4


def _read_states(path: Path, name: str) -> tuple[NDArray[np.float64], str | None]:
    """Reads states and model of a demo. Runs in the child process."""
    with open_file(path) as file:
        demo = file["data"][name]
        return np.asarray(demo["states"][()], dtype=np.float64), _model_xml(demo) or None


def _model_xml(demo: h5py.Group) -> str:
    model = demo.attrs.get("model_file", "")
    return model.decode() if isinstance(model, bytes) else str(model)


class StatesOfDemo(NamedTuple):
    """The states (T, n) of one demo, and the model that it was recorded in, if any."""

    number: int
    name: str
    states: NDArray[np.float64]
    model_xml: str | None

    def __str__(self) -> str:
        return self.name

    @property
    def digest(self) -> str:
        return digest(np.ascontiguousarray(self.states).tobytes(), (self.model_xml or "").encode())


class States:
    """Hands out the demos whose images no part holds yet.

    Attributes:
        fitted_model: the first demo's model, if it is of another robosuite release; known once all demos are done.
    """

    def __init__(self, source: Path, demos: Sequence[SourceDemo], parts: Parts, bar: Progress | None) -> None:
        self._source, self._parts, self._bar = source, parts, bar
        self._left = iter(enumerate(demos))
        self.fitted_model: str | None = None

    def next(self) -> StatesOfDemo | None:
        for number, demo in self._left:
            with damage_as_error(self._source, f"the states of {demo.name}"):
                states, model = isolated(_read_states, self._source, demo.name)
            unit = StatesOfDemo(number, demo.name, states, model)
            part = _read_part(self._parts.path(number))
            if part is None or part.digest != unit.digest:
                return unit
            self.done(unit, part.fitted)
        return None

    def done(self, unit: StatesOfDemo, result: bool) -> None:
        if result and unit.number == 0:
            self.fitted_model = unit.model_xml
        if self._bar is not None:
            self._bar.advance()


class PartInfo(NamedTuple):
    """Attributes of a part: the digest of its states and model, and whether the model had to be fitted."""

    digest: str
    fitted: bool


def _read_part(path: Path) -> PartInfo | None:
    if not path.exists():
        return None
    with h5py.File(path, "r") as file:
        return PartInfo(str(file.attrs["digest"]), bool(file.attrs["fitted"]))


class Rendering(NamedTuple):
    """Renders demos and writes the images of each as a part in a folder.

    Attributes:
        several_models: whether the demos were recorded in more than one model.
    """

    config: RerenderConfig
    env_args: dict[str, Any]
    flags: dict[str, bool]
    several_models: bool
    folder: Path

    @contextmanager
    def open(self) -> Iterator[Callable[[StatesOfDemo], bool]]:
        with Environment.from_env_args(self.env_args, self.config.sizes, self.flags) as env:
            if self.several_models:
                env.compile_again()
            yield partial(self.render, env)

    def render(self, env: Environment, unit: StatesOfDemo) -> bool:
        """Writes the part of a demo; returns whether its model had to be fitted to this release."""
        try:
            images = render_states(env, unit.states, unit.model_xml)
        except ConfigError as error:
            raise ConfigError(f"{self.config.source}: {unit.name}: {error}") from error
        with (
            atomic_path(part_path(self.folder, unit.number)) as path,
            new_hdf5(path) as (file, _),
        ):
            file.attrs["digest"], file.attrs["fitted"] = unit.digest, env.fitted
            write_images(file.create_group(DEMO), images, self.config)
        return env.fitted


def render_states(env: Environment, states: NDArray, model_xml: str | None) -> dict[str, NDArray[np.uint8]]:
    """Returns camera → images (T, H, W, 3) of states (T, n)."""
    images = {camera: np.empty((len(states), *size, 3), np.uint8) for camera, size in env.cameras.items()}
    for step, state in enumerate(states):
        obs = env.restore(state, model_xml if step == 0 else None)
        for camera, values in images.items():
            values[step] = obs[camera]
    return images


def _write(
    source: Path, parts: Parts, names: Sequence[str], cameras: Sequence[str], attributes: Mapping[str, str]
) -> None:
    """Writes the copy with the images of all parts. Runs in the child process."""
    with open_file(source) as old, new_hdf5(parts.file) as (file, check_written):
        for key in (key for key in old if key != "data"):
            old.copy(key, file, expand_soft=True, expand_external=True)
        data = file.create_group("data")
        file.attrs.update(old.attrs)
        data.attrs.update({**old["data"].attrs, **attributes})
        for number, name in enumerate(names):
            made_progress()
            demo = data.create_group(name)
            _copy_demo(old["data"][name], demo, cameras)
            with h5py.File(parts.path(number), "r") as part:
                for camera in cameras:
                    part.copy(f"{DEMO}/obs/{camera}", demo.require_group("obs"))
            check_written()


def _copy_demo(old: h5py.Group, new: h5py.Group, cameras: Sequence[str]) -> None:
    """Copies a demo without its images."""
    new.attrs.update(old.attrs)
    for key, item in old.items():
        if key not in OBS or not isinstance(item, h5py.Group):
            old.copy(key, new, expand_soft=True, expand_external=True)
            continue
        obs = new.create_group(key)
        obs.attrs.update(item.attrs)
        for name in (name for name, value in item.items() if not _is_image(value) and name not in cameras):
            item.copy(name, obs, expand_soft=True, expand_external=True)
