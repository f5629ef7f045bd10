"""Reads one or several robomimic HDF5 files as one list of demos.

dataset = Dataset.open("lift.hdf5", cameras=["agentview_image"], filter_key="train")
dataset.frames(0, "agentview_image")        # (T, 84, 84, 3) uint8
dataset.rows(0)["actions"]                  # (T, 7) float32
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from cache_pipeline.demos.checks import (
    Wanted,
    agreement_problems,
    choice_of,
    content_problems,
    default_low_dim,
    find_cameras,
    find_low_dim,
    read_numbers,
    select_demos,
    skipped_demos,
    structure_problems,
    unused_images,
)
from cache_pipeline.demos.frames import INFLATE_THREADS, start_reading
from cache_pipeline.demos.layouts.robomimic import DemoInfo, FileInfo, FileStamp, damage_as_error, open_file, scan_file
from cache_pipeline.demos.split import VALID_KEY
from cache_pipeline.errors import DatasetError, available

logger = logging.getLogger("cache_pipeline")

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class Demo(NamedTuple):
    """One demo: ``file`` is an index into ``Dataset.files``, ``length`` its steps."""

    file: int
    name: str
    length: int


class SourceFile(NamedTuple):
    """Size and time of one HDF5 file when it was opened; ``path`` is absolute, ``linked`` are the files it links to."""

    path: Path
    size: int
    mtime_ns: int
    linked: tuple[FileStamp, ...] = ()

    def check_unchanged(self) -> None:
        """Raises DatasetError if this file or a linked file has changed since it was opened."""
        for then in (FileStamp(*self[:3]), *self.linked):
            try:
                now = FileStamp.of(then.path)
            except FileNotFoundError as error:
                raise DatasetError(f"{then.path} disappeared while it was read; put it back, run again") from error
            if now != then:
                raise DatasetError(f"{then.path} has changed since it was opened; run the same command again")


class Dataset:
    """Demos of one or several robomimic files; create it with :meth:`open`.

    Safe to fork, pickle and read from several threads: each process opens its own handles.

    Attributes:
        files: the files, in the given order.
        demos: in numeric order, file by file.
        cameras: name → (H, W, 3).
        low_dim: key → (width,). Values with more axes per step are flattened, as in robomimic's networks.
        action_dim: A.
        choice: the keys that are used and those that are left out.
        masks: filter key → indices into ``demos``, for keys that every file has, and for ``valid`` if any file has it.
        absent: filter key → names of its demos that are not in the files.
        env_args, render_flags: JSON attributes of the files; ``None`` if the files differ.
    """

    def __init__(self, infos: Sequence[FileInfo], chosen: Sequence[Sequence[DemoInfo]], wanted: Wanted) -> None:
        self.files = tuple(SourceFile(i.path.absolute(), i.size, i.mtime_ns, i.linked) for i in infos)
        self.demos = tuple(Demo(i, demo.name, demo.length) for i, demos in enumerate(chosen) for demo in demos)
        first = chosen[0][0]
        self.cameras = {camera: _image_size(first.obs[camera].shape) for camera in wanted.cameras}
        self.low_dim = {key: (math.prod(first.obs[key].shape[1:]),) for key in wanted.low_dim}
        self.choice = choice_of(list(chain.from_iterable(chosen)), wanted)
        self.action_dim: int = first.arrays["actions"].shape[1]
        self.masks, self.absent = _combine_masks(infos, self.demos)
        self.env_args: dict[str, Any] | None = _common([info.env_args for info in infos])
        self.render_flags: dict[str, Any] | None = _common([info.render_flags for info in infos])
        self._handles = _Handles(self.files)

    @classmethod
    def open(
        cls,
        paths: Paths,
        *,
        cameras: Sequence[str] | None = None,
        low_dim_keys: Sequence[str] | None = None,
        filter_key: str | None = None,
    ) -> Dataset:
        """Opens files and checks metadata, actions and low-dim obs; images are decoded later, when they are read.

        Args:
            paths: one or several paths. Several files must have the same cameras, keys and action dim.
            cameras: rgb obs keys; default: every obs that is uint8 (T, H, W, 3). ``()``: no images.
            low_dim_keys: default: the position, orientation and gripper keys of every arm (``robot0_eef_pos``,
                ``robot0_eef_quat``, ``robot0_gripper_qpos``, …); without such keys, every low-dim key. ``object`` is
                privileged information: it is left out if there are cameras.
            filter_key: use only the demos of this key of each file's ``mask`` group; default: every demo.

        Raises:
            DatasetError: the first problem found.
        """
        infos = [scan_file(path) for path in distinct_paths(paths)]
        for info in infos:
            if info.empty:
                logger.warning("%s: %s", info.path, skipped_demos(info))
        chosen = [select_demos(info, filter_key) for info in infos]
        demos = list(chain.from_iterable(chosen))
        wanted = _choose(infos, demos, cameras, low_dim_keys)
        for info, part in zip(infos, chosen, strict=True):
            _raise_first(info.path, _problems(info, part, wanted, found_by_type=cameras is None))
        _check_agreement(infos, chosen, wanted)
        return cls(infos, chosen, wanted)

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
        out = np.empty((sum(stop - start for _, start, stop in segments), *self.cameras[camera]), np.uint8)
        pool, reading, filled = self._handles.pool(), [], 0
        for segment in segments:
            demo, start, stop = segment
            part = out[filled : filled + stop - start]
            filled += len(part)
            handle = self._handles.file(self.demos[demo].file)
            with self._damage_as_error(camera, segment):
                images = handle[f"data/{self.demos[demo].name}/obs/{camera}"]
                reading.append((segment, start_reading(images, start, part, pool)))
        for segment, futures in reading:
            with self._damage_as_error(camera, segment):
                for future in futures:
                    future.result()
        return out

    def _damage_as_error(self, camera: str, segment: tuple[int, int, int]) -> AbstractContextManager[None]:
        demo, start, stop = segment
        source = self.files[self.demos[demo].file]
        return damage_as_error(source.path, f"{self.demos[demo].name}: {camera!r} between frames {start} and {stop}")

    def rows(self, demo: int) -> dict[str, np.ndarray]:
        """Reads all arrays of a demo except images, as float32.

        ``actions`` (T, A), ``rewards`` (T,), ``dones`` (T,), ``low_dim/<key>`` (T, …). Missing rewards or dones
        are NaN, not zeros.
        """
        file, name, length = self.demos[demo]
        handle = self._handles.file(file)
        with damage_as_error(self.files[file].path, f"the actions and low-dim obs of {name}"):
            rows = {"actions": read_numbers(handle, name, "actions")}
            for key in ("rewards", "dones"):
                there = key in handle[f"data/{name}"]
                rows[key] = read_numbers(handle, name, key) if there else np.full(length, np.nan, np.float32)
            for key, shape in self.low_dim.items():
                rows[f"low_dim/{key}"] = read_numbers(handle, name, f"obs/{key}").reshape(length, *shape)
        return rows

    def close(self) -> None:
        """Closes the handles of this process; they reopen on the next read."""
        self._handles.close()

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_handles"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._handles = _Handles(self.files)

    def __repr__(self) -> str:
        return (
            f"Dataset({len(self.demos)} demos, {self.steps} steps, cameras {list(self.cameras)}, "
            f"files {[str(file.path) for file in self.files]})"
        )


class _Handles:
    """File handles of one process; a forked child opens its own."""

    def __init__(self, files: Sequence[SourceFile]) -> None:
        self._files = files
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._open: dict[int, h5py.File] = {}
        self._pool: ThreadPoolExecutor | None = None

    def _check_process(self) -> None:
        if self._process != os.getpid():
            self._reset()

    def file(self, number: int) -> h5py.File:
        self._check_process()
        with self._lock:
            if number not in self._open:
                source = self._files[number]
                handle = open_file(source.path)
                try:
                    source.check_unchanged()
                except DatasetError:
                    handle.close()
                    raise
                self._open[number] = handle
            return self._open[number]

    def pool(self) -> ThreadPoolExecutor:
        self._check_process()
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(INFLATE_THREADS, thread_name_prefix="inflate")
            return self._pool

    def close(self) -> None:
        self._check_process()
        with self._lock:
            for handle in self._open.values():
                handle.close()
            self._open.clear()
            if self._pool is not None:
                self._pool.shutdown()
                self._pool = None


def distinct_paths(paths: Paths) -> list[Path]:
    """Returns the paths in order; raises ``DatasetError`` for no path or a repeated path."""
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not given:
        raise DatasetError("no dataset is given; name one or several robomimic HDF5 files")
    found: dict[Path, Path] = {}
    for path in (Path(path).expanduser() for path in given):
        if path.resolve() in found:
            raise DatasetError(f"{path} is named twice; name each file once")
        found[path.resolve()] = path
    return list(found.values())


def _choose(
    infos: Sequence[FileInfo],
    demos: Sequence[DemoInfo],
    cameras: Sequence[str] | None,
    low_dim_keys: Sequence[str] | None,
) -> Wanted:
    where = ", ".join(str(info.path) for info in infos)
    chosen = find_cameras(demos) if cameras is None else _named("camera", cameras, find_cameras(demos), demos, where)
    if cameras is None and not chosen:
        _raise_first(infos[0].path, unused_images(demos))
        raise DatasetError(
            f"{where} holds no cameras: no obs is uint8 (T, H, W, 3); {available(find_low_dim(demos))}; "
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
    with open_file(info.path) as file:
        yield from content_problems(file, demos, wanted)


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


def _image_size(shape: tuple[int, ...]) -> tuple[int, int, int]:
    _, height, width, channels = shape
    return height, width, channels
