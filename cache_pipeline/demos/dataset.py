"""Reads one or several datasets, of any layout, as one list of demos.

dataset = Dataset.open("lift.hdf5", cameras=["agentview_image"], filter_key="train")
dataset.frames(0, "agentview_image")        # (T, 84, 84, 3) uint8
dataset.rows(0)["actions"]                  # (T, 7) float32
"""

from __future__ import annotations

import copy
import logging
import math
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cache_pipeline.demos.checks import (
    CAMERA_FORMS,
    DEFAULT_ACTIONS,
    Wanted,
    action_keys,
    agreement_problems,
    choice_of,
    default_low_dim,
    find_cameras,
    find_low_dim,
    number_paths,
    select_demos,
    skipped_demos,
    structure_problems,
    unused_images,
    with_actions,
)
from cache_pipeline.demos.choice import Choice
from cache_pipeline.demos.layouts.protocol import DemoInfo, FileInfo, SourceFile, segment_in_words
from cache_pipeline.demos.layouts.registry import layout_of
from cache_pipeline.demos.numbers import check_numbers, lost_variation
from cache_pipeline.demos.reading import close_files, layout_findings, read_frames, read_rows
from cache_pipeline.demos.remote import local_path
from cache_pipeline.demos.split import VALID_KEY
from cache_pipeline.errors import DatasetError, available
from cache_pipeline.files import resolved
from cache_pipeline.hdf5 import damage_as_error
from cache_pipeline.isolation import IsolatedCrashError, isolated, isolated_when_free

logger = logging.getLogger("cache_pipeline")

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class Demo(NamedTuple):
    """One demo: ``file`` is an index into ``Dataset.files``, ``length`` its steps, ``task`` its task in words."""

    file: int
    name: str
    length: int
    task: str | None = None


class Dataset:
    """Demos of one or several datasets; :meth:`open` reads and checks what the arguments hold.

    Files are read in a child process, because a damaged file can crash HDF5. Safe to fork, pickle and read from several
    threads.

    Attributes:
        files: the files or folders, in the given order, each with the name of its layout.
        demos: in numeric order, file by file.
        cameras: name → (H, W, 3).
        low_dim: key → (width,). Values with more axes per step are flattened, as in robomimic's networks.
        action_dim: A.
        action_keys: the arrays that are the actions, side by side.
        choice: the keys that are used and those that are left out.
        masks: filter key → indices into ``demos``, for keys that every file has, and for ``valid`` if any file has it.
        absent: filter key → names of its demos that are not in the files.
        env_args, render_flags: JSON attributes of the files; ``None`` if the files differ.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        demos: Sequence[Demo],
        *,
        cameras: Mapping[str, tuple[int, int, int]],
        low_dim: Mapping[str, tuple[int, ...]],
        action_dim: int,
        choice: Choice,
        masks: Mapping[str, tuple[int, ...]],
        absent: Mapping[str, tuple[str, ...]],
        env_args: dict[str, Any] | None,
        render_flags: dict[str, Any] | None,
    ) -> None:
        self.files, self.demos = tuple(files), tuple(demos)
        self.cameras, self.low_dim, self.action_dim = dict(cameras), dict(low_dim), action_dim
        self.action_keys = choice.actions
        self.choice, self.masks, self.absent = choice, dict(masks), dict(absent)
        self.env_args, self.render_flags = env_args, render_flags
        weakref.finalize(self, isolated_when_free, close_files, self.files).atexit = False

    @classmethod
    def open(
        cls,
        paths: Paths,
        *,
        cameras: Sequence[str] | None = None,
        low_dim_keys: Sequence[str] | None = None,
        filter_key: str | None = None,
        action_key: Sequence[str] | None = None,
    ) -> Dataset:
        """Opens files and checks metadata, actions and low-dim obs; images are decoded later, when they are read.

        Args:
            paths: one or several HDF5 files or LeRobot folders, by path or by URL. Several must have the same cameras,
                keys and action dim.
            cameras: rgb obs keys; default: every obs that holds rgb or grey images: uint8 frames or encoded ones.
                ``()``: no images.
            low_dim_keys: default: the position, orientation and gripper keys of every arm (``robot0_eef_pos``,
                ``robot0_eef_quat``, ``robot0_gripper_qpos``, …); without such keys, every low-dim key. ``object`` is
                privileged information: it is left out if there are cameras.
            filter_key: use only the demos of this key of each file's ``mask`` group; default: every demo.
            action_key: arrays that are the actions, side by side, such as ``["actions_abs"]``; default: ``actions``.

        Raises:
            DatasetError: the first problem found.
        """
        infos = [layout_of(path).scan(path) for path in distinct_paths(paths)]
        for info in infos:
            for note in (*info.notes, *([skipped_demos(info)] if info.empty else [])):
                logger.warning("%s: %s", info.path, note)
        chosen = [select_demos(info, filter_key) for info in infos]
        actions = _action_keys(infos, chain.from_iterable(chosen), action_key)
        chosen = [tuple(with_actions(demo, actions) for demo in part) for part in chosen]
        demos = list(chain.from_iterable(chosen))
        wanted = _choose(infos, demos, cameras, low_dim_keys)._replace(actions=actions)
        for info, part in zip(infos, chosen, strict=True):
            _raise_first(info.path, _problems(info, part, wanted, found_by_type=cameras is None))
        _check_agreement(infos, chosen, wanted)
        table = tuple(Demo(i, demo.name, demo.length, demo.task) for i, part in enumerate(chosen) for demo in part)
        masks, absent = _combine_masks(infos, table)
        first = demos[0]
        return cls(
            [info.source for info in infos],
            table,
            cameras={camera: _image_size(first, camera) for camera in wanted.cameras},
            low_dim={key: (math.prod(first.obs[key].shape[1:]),) for key in wanted.low_dim},
            action_dim=first.arrays["actions"].shape[1],
            choice=choice_of(demos, wanted),
            masks=masks,
            absent=absent,
            env_args=_common([info.env_args for info in infos]),
            render_flags=_common([info.render_flags for info in infos]),
        )

    def at(self, paths: Sequence[Path]) -> Dataset:
        """Returns the same dataset, read from files at other paths, such as copies on another machine."""
        moved = copy.copy(self)
        moved.files = tuple(file._replace(path=path) for file, path in zip(self.files, paths, strict=True))
        weakref.finalize(moved, isolated_when_free, close_files, moved.files).atexit = False
        return moved

    @property
    def steps(self) -> int:
        """Number of steps of all demos, which is the number of frames of one camera."""
        return sum(demo.length for demo in self.demos)

    def frames(self, demo: int, camera: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads frames [start, stop) of a demo into a new uint8 (n, H, W, 3) array; errors as in :meth:`gather`."""
        return self.gather(camera, [(demo, start, self.demos[demo].length if stop is None else stop)])

    def gather(self, camera: str, segments: Sequence[tuple[int, int, int]]) -> np.ndarray:
        """Reads frames of several segments (demo, start, stop) into a new uint8 (n, H, W, 3) array, in this order.

        All segments are read together, so gzip chunks of many demos are decompressed in parallel.

        Raises:
            DatasetError: unknown camera, damaged frames, or a file that was removed or changed since it was opened.
            IndexError: frames outside the demo.
        """
        if camera not in self.cameras:
            raise DatasetError(f"no camera {camera!r} was opened; {available(self.cameras, camera)}")
        for demo, start, stop in segments:
            if not 0 <= start <= stop <= self.demos[demo].length:
                raise IndexError(
                    f"frames {start}:{stop} of {self.demos[demo].name}, which has {self.demos[demo].length}"
                )
        parts = [
            self._read(camera, file, [segment for _, segment in group])
            for file, group in groupby(
                ((self.demos[demo].file, (self.demos[demo].name, start, stop)) for demo, start, stop in segments),
                key=itemgetter(0),
            )
        ]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty((0, *self.cameras[camera]), np.uint8), *parts])

    def _read(self, camera: str, file: int, segments: list[tuple[str, int, int]]) -> np.ndarray:
        source = self.files[file]
        try:
            return isolated(read_frames, source, camera, self.cameras[camera], segments)
        except IsolatedCrashError as error:
            for segment in segments if len(segments) > 1 else ():  # find the one that crashes, to name it
                self._read(camera, file, [segment])
            with damage_as_error(source.path, segment_in_words(camera, segments[0])):
                raise error

    def rows(self, demo: int) -> dict[str, np.ndarray]:
        """Reads all arrays of a demo except images, as float32.

        ``actions`` (T, A), ``rewards`` (T,), ``dones`` (T,), ``low_dim/<key>`` (T, …). Missing rewards or dones
        are NaN, not zeros.
        """
        file, name, length, _ = self.demos[demo]
        with damage_as_error(self.files[file].path, f"the actions and low-dim obs of {name}"):
            return isolated(read_rows, self.files[file], name, length, self.low_dim, self.action_keys)

    def close(self) -> None:
        """Closes the files; they reopen on the next read."""
        isolated_when_free(close_files, self.files)

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"Dataset({len(self.demos)} demos, {self.steps} steps, cameras {list(self.cameras)}, "
            f"files {[str(file.path) for file in self.files]})"
        )


def distinct_paths(paths: Paths) -> list[Path]:
    """Returns the paths in order, those of copies for URLs.

    Raises:
        DatasetError: no path, a repeated path, or one without a dataset.
        ConfigError, StoreError, ChangedError: as :func:`~cache_pipeline.demos.remote.local_path`.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not given:
        raise DatasetError("no dataset is given; name one or several robomimic HDF5 files or LeRobot folders")
    found: dict[Path, Path] = {}
    for path in map(local_path, given):
        file = resolved(path)
        if file in found:
            raise DatasetError(f"{path} is named twice; name each file once")
        layout_of(path)
        found[file] = path
    return list(found.values())


def _action_keys(infos: Sequence[FileInfo], demos: Iterable[DemoInfo], asked: Sequence[str] | None) -> tuple[str, ...]:
    """Returns the action arrays; raises DatasetError for unknown names."""
    assert not isinstance(asked, str), "action keys are a list of names"
    there = list(dict.fromkeys(key for demo in demos for key in action_keys(demo)))
    for name in asked or ():
        if name not in there:
            raise DatasetError(f"{_where(infos)} has no action key {name!r}; {available(there, name)}")
    return tuple(dict.fromkeys(asked)) if asked else DEFAULT_ACTIONS


def _where(infos: Sequence[FileInfo]) -> str:
    return str(infos[0].path) if len(infos) == 1 else f"{infos[0].path} and {len(infos) - 1} more"


def _choose(
    infos: Sequence[FileInfo],
    demos: Sequence[DemoInfo],
    cameras: Sequence[str] | None,
    low_dim_keys: Sequence[str] | None,
) -> Wanted:
    where = _where(infos)
    chosen = find_cameras(demos) if cameras is None else _named("camera", cameras, find_cameras(demos), demos, where)
    if cameras is None and not chosen:
        _raise_first(infos[0].path, unused_images(demos))
        raise DatasetError(
            f"{where} holds no cameras: no obs is {CAMERA_FORMS}; {available(find_low_dim(demos))}; "
            "features need a dataset with images (robomimic's dataset_states_to_obs.py renders them)"
        )
    if low_dim_keys is None:
        return Wanted(chosen, default_low_dim(demos, with_cameras=bool(chosen)))
    return Wanted(chosen, _named("low-dim key", low_dim_keys, find_low_dim(demos), demos, where))


def _named(
    kind: str, asked: Sequence[str], right: Sequence[str], demos: Sequence[DemoInfo], where: str
) -> tuple[str, ...]:
    """Returns the requested names; raises for unknown names. Types are checked later."""
    assert not isinstance(asked, str), f"{kind}s are a list of names"
    everything = {key for demo in demos for key in demo.obs}
    for name in asked:
        if name not in everything:
            raise DatasetError(f"{where} has no {kind} {name!r}; {available(right, name)}")
    return tuple(dict.fromkeys(asked))


def _problems(info: FileInfo, demos: Sequence[DemoInfo], wanted: Wanted, found_by_type: bool) -> Iterator[str]:
    """Yields all problems of the chosen demos of a file, cheap checks first."""
    yield from info.problems
    if found_by_type:
        yield from unused_images(demos)
    yield from structure_problems(demos, wanted)
    yield from agreement_problems(demos, wanted)
    arrays = [(demo.name, number_paths(demo, wanted.low_dim, wanted.actions)) for demo in demos]
    report = check_numbers(info.source, arrays)
    yield from (f"{finding.demo}: {finding.sentence}" for finding in report.findings)
    problems, notes = layout_findings(info.source, [demo.name for demo in demos])
    yield from problems
    for sentence in (*notes, *lost_variation(report.statistics)):
        logger.warning("%s: %s", info.path, sentence)


def _raise_first(path: Path, problems: Iterator[str]) -> None:
    for problem in problems:
        raise DatasetError(f"{path}: {problem}")


def _check_agreement(infos: Sequence[FileInfo], chosen: Sequence[Sequence[DemoInfo]], wanted: Wanted) -> None:
    heads = [demos[0]._replace(name=f"{info.path}: {demos[0].name}") for info, demos in zip(infos, chosen, strict=True)]
    for problem in agreement_problems(heads, wanted):
        raise DatasetError(f"{problem}; several files must have the same cameras, keys and action dim")


def _combine_masks(
    infos: Sequence[FileInfo], demos: Sequence[Demo]
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[str, ...]]]:
    """Returns (filter key → indices, filter key → absent names). A demo held out in one file stays held out."""
    index = {(demo.file, demo.name): number for number, demo in enumerate(demos)}
    masks: dict[str, tuple[int, ...]] = {}
    absent: dict[str, tuple[str, ...]] = {}
    for key in dict.fromkeys(key for info in infos for key in info.masks):
        if key != VALID_KEY and not all(key in info.masks for info in infos):
            continue
        members = [(number, name) for number, info in enumerate(infos) for name in info.masks.get(key, ())]
        here = tuple(sorted(index[member] for member in members if member in index))
        gone = tuple(name for number, name in members if (number, name) not in index)
        masks |= {key: here} if here else {}
        absent |= {key: gone} if gone else {}
    return masks, absent


def _common(values: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    return values[0] if all(value == values[0] for value in values) else None


def _image_size(demo: DemoInfo, camera: str) -> tuple[int, int, int]:
    size = demo.obs[camera].frame
    assert size is not None
    return size
