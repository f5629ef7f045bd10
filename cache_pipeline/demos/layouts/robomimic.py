"""Reads the metadata of one robomimic HDF5 file.

    data/<demo>/{obs/<key>, actions, rewards, dones}    mask/<filter key>    data.attrs: env_args, render_flags, total

``scan_file`` raises only if nothing can be read. It records other findings, which ``checks.py`` evaluates.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from isal import igzip_lib

from cache_pipeline.demos.links import (
    SourceFiles,
    broken_link,
    has_link,
    is_written,
    other_filters,
)
from cache_pipeline.errors import DatasetError

# Exceptions of h5py for damaged objects, broken links and types that NumPy lacks.
READ_ERRORS = (OSError, KeyError, RuntimeError, ValueError, TypeError)
STEP_ARRAYS = ("actions", "rewards", "dones")
# Largest number of values per step of an array with several axes that counts as low-dim by default: poses and key
# points, not depth images.
MOST_FLAT = 256


class ArrayInfo(NamedTuple):
    """One HDF5 dataset.

    ``compression`` is ``none``, ``gzip-4``, …; ``written``: the file holds all its bytes; ``trouble``: why it cannot be
    read, such as a missing filter.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...] | None
    compression: str
    stored_bytes: int
    written: bool
    trouble: str = ""

    @property
    def is_image(self) -> bool:
        """Whether it is uint8 (T, H, W, 3)."""
        return self.dtype == np.uint8 and len(self.shape) == 4 and self.shape[-1] == 3

    @property
    def is_picture(self) -> bool:
        """Whether it has the shape of images, (T, H, W, channels) or (T, channels, H, W)."""
        return len(self.shape) == 4 and (self.shape[-1] in (1, 3, 4) or self.shape[1] in (1, 3, 4))

    @property
    def is_numbers(self) -> bool:
        """Whether it holds numbers per step and is not an rgb image: the user may name it as a low-dim key."""
        return self.dtype.kind in "fiub" and len(self.shape) >= 1 and not self.is_image

    @property
    def is_low_dim(self) -> bool:
        """Whether it is low-dim by default: a number, a row or a small block (flattened later) per step."""
        flat = len(self.shape) <= 2 or (not self.is_picture and self.width <= MOST_FLAT)
        return self.is_numbers and flat

    @property
    def width(self) -> int:
        """Number of values per step."""
        return math.prod(self.shape[1:])

    def __str__(self) -> str:
        return f"{self.dtype} ({', '.join(map(str, self.shape))})"


class DemoInfo(NamedTuple):
    """One demo; ``arrays`` maps ``actions``, ``rewards``, ``dones`` and ``obs/<key>`` to their metadata."""

    name: str
    arrays: dict[str, ArrayInfo]
    num_samples: int | None
    other_actions: tuple[str, ...] = ()
    """Other arrays and groups with ``action`` in their name, such as ``actions_abs``."""

    @property
    def obs(self) -> dict[str, ArrayInfo]:
        """Obs key → array."""
        return {path.removeprefix("obs/"): info for path, info in self.arrays.items() if path.startswith("obs/")}

    @property
    def length(self) -> int:
        """Number of steps: the rows of ``actions``, or 0 without actions."""
        actions = self.arrays.get("actions")
        return actions.shape[0] if actions is not None and actions.shape else 0

    @property
    def empty(self) -> bool:
        """Whether no array of the demo has a step."""
        return all(info.shape[:1] == (0,) for info in self.arrays.values())


class FileStamp(NamedTuple):
    """Path (absolute), size and modification time of a file at one moment."""

    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> FileStamp:
        """Reads the current size and time of a file."""
        stat = path.stat()
        return cls(path.absolute(), stat.st_size, stat.st_mtime_ns)


class FileInfo(NamedTuple):
    """One file: demos in numeric order, filter keys, problems (unreadable items) and notes (unusual items).

    ``empty`` names demos without steps, which are in neither ``demos`` nor ``masks``. ``linked``: other files that its
    links and virtual datasets read.
    """

    path: Path
    size: int
    mtime_ns: int
    demos: tuple[DemoInfo, ...]
    masks: dict[str, tuple[str, ...]]
    env_args: dict[str, Any] | None
    render_flags: dict[str, Any] | None
    total: int | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    empty: tuple[str, ...] = ()
    linked: tuple[FileStamp, ...] = ()

    def present(self, key: str) -> tuple[str, ...]:
        """Returns the demos of a filter key that are in the file, in the order of ``demos``."""
        members = set(self.masks[key])
        return tuple(demo.name for demo in self.demos if demo.name in members)

    def absent(self, key: str) -> tuple[str, ...]:
        """Returns the demos that a filter key names but the file does not have."""
        return tuple(sorted(set(self.masks[key]) - {demo.name for demo in self.demos}, key=demo_order))


def demo_order(name: str) -> tuple[list[Any], str]:
    """Returns a sort key that puts ``demo_2`` before ``demo_10``."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def open_file(path: Path) -> h5py.File:
    """Opens a file for reading.

    Raises:
        DatasetError: the file is missing, unreadable, not HDF5, truncated, or being written by another process.
    """
    try:
        if not path.exists():
            near = sorted(other.name for other in path.parent.glob("*.hdf5")) if path.parent.is_dir() else []
            beside = f"; the folder holds {', '.join(near[:12])}" if near else "; check the path"
            raise DatasetError(f"there is no file {path}{beside}")
        if path.is_dir():
            raise DatasetError(f"{path} is a folder; name a robomimic HDF5 file")
        return h5py.File(path, "r")
    except PermissionError as error:
        raise DatasetError(f"no permission to read {path}; change its permissions") from error
    except BlockingIOError as error:
        raise DatasetError(f"{path} is being written by another process; wait until it is closed") from error
    except OSError as error:
        raise DatasetError(f"{path} {_why_not_opened(path, ' '.join(str(error).split()))}") from error


def _why_not_opened(path: Path, reason: str) -> str:
    if "truncated" in reason:
        expected = re.search(r"stored_eof = (\d+)", reason)
        size = f"{path.stat().st_size} bytes" + (f" of {expected[1]}" if expected else "")
        return f"is cut off ({size}): copy or download it again"
    if "unable to lock" in reason:
        return f"cannot be locked for reading on this file system ({reason}); set HDF5_USE_FILE_LOCKING=FALSE"
    if not h5py.is_hdf5(path):
        return "is not an HDF5 file; name a robomimic .hdf5 file"
    return f"cannot be opened, its HDF5 header is damaged ({reason}); copy or download it again"


@contextmanager
def damage_as_error(path: Path, what: str = "its structure") -> Iterator[None]:
    """Converts errors of h5py and ISA-L for damaged bytes to ``DatasetError``."""
    try:
        yield
    except DatasetError:
        raise
    except (*READ_ERRORS, igzip_lib.IsalError) as error:  # type: ignore[misc]
        reason = " ".join(str(error).split())
        raise DatasetError(f"{path} is damaged: {what} cannot be read ({reason}); copy or download it again") from error


def scan_file(path: str | Path) -> FileInfo:
    """Reads names, shapes, types, filter keys and attributes, but no array content.

    Raises:
        DatasetError: the file cannot be opened, has no ``data`` group, or has no demos.
    """
    path = Path(path).expanduser()
    problems: list[str] = []
    notes: list[str] = []
    sources = SourceFiles()
    with open_file(path) as file, damage_as_error(path):
        stat = path.stat()
        data = _get(file, "data")
        if not isinstance(data, h5py.Group):
            broken = broken_link(file, "data") if data is None else None
            if broken is not None:
                raise DatasetError(f"{path}: its group 'data' {broken}")
            there = ", ".join(list(file)[:8]) or "nothing"
            raise DatasetError(f"{path} has no group 'data' (it holds {there}); is it a robomimic dataset?")
        demos = []
        for name in sorted(data, key=demo_order):
            group = _get(data, name)
            if isinstance(group, h5py.Group):
                demos.append(_scan_demo(group, name, problems, sources))
            else:
                broken = broken_link(data, name) if group is None else None
                problems.append(f"{name}: data/{name} {broken or 'is not a group, so it is not a demo'}")
        sources.add(data)
        if not demos:
            raise DatasetError(f"{path} holds no demos: its group 'data' is empty; collect demos first")
        empty = tuple(demo.name for demo in demos if demo.empty and not _is_reported(demo, problems))
        if len(empty) == len(demos):
            raise DatasetError(f"{path} holds no steps: all of its {len(demos)} demos are empty; collect demos first")
        return FileInfo(
            path=path,
            size=stat.st_size,
            mtime_ns=stat.st_mtime_ns,
            demos=tuple(demo for demo in demos if demo.name not in empty),
            masks=_scan_masks(file, set(empty), notes, sources),
            env_args=_json_attribute(data, "env_args", notes),
            render_flags=_json_attribute(data, "render_flags", notes),
            total=_int_attribute(data, "total"),
            problems=tuple(problems),
            notes=tuple(notes),
            empty=empty,
            linked=tuple(FileStamp.of(other) for other in sources.found if not other.samefile(path)),
        )


def _is_reported(demo: DemoInfo, problems: list[str]) -> bool:
    """Whether ``problems`` already names an unreadable array of the demo: it is damaged, not empty."""
    return any(problem.startswith(f"{demo.name}: ") for problem in problems)


def _get(group: h5py.Group, name: str) -> Any:
    try:
        return group[name]
    except READ_ERRORS:
        return None


def _scan_demo(group: h5py.Group, name: str, problems: list[str], sources: SourceFiles) -> DemoInfo:
    sources.add(group)
    paths = [path for path in STEP_ARRAYS if has_link(group, path)]
    obs = _get(group, "obs")
    if isinstance(obs, h5py.Group):
        sources.add(obs)
        paths += [f"obs/{key}" for key in sorted(obs)]
    elif obs is None and (broken := broken_link(group, "obs")):
        problems.append(f"{name}: obs {broken}")
    arrays = {}
    for path in paths:
        try:
            item = group[path]
            if isinstance(item, h5py.Dataset):
                arrays[path] = _scan_array(item, sources.add(item))
        except READ_ERRORS as error:
            parent, _, key = path.rpartition("/")
            broken = broken_link(group[parent] if parent else group, key)
            problems.append(f"{name}: {path} cannot be read" + (f": it {broken}" if broken else f" ({error})"))
    others = tuple(key for key in group if "action" in key and key != "actions")
    return DemoInfo(name, arrays, _int_attribute(group, "num_samples"), others)


def _scan_array(item: h5py.Dataset, trouble: str = "") -> ArrayInfo:
    compression = next(iter(other_filters(item).values()), "none")
    if item.compression is not None:
        compression = (
            item.compression if item.compression_opts is None else f"{item.compression}-{item.compression_opts}"
        )
    stored, written = item.id.get_storage_size(), not trouble and is_written(item)
    return ArrayInfo(tuple(item.shape or ()), item.dtype, item.chunks, compression, stored, written, trouble)


def _scan_masks(file: h5py.File, empty: set[str], notes: list[str], sources: SourceFiles) -> dict[str, tuple[str, ...]]:
    group = _get(file, "mask")
    if not isinstance(group, h5py.Group):
        return {}
    sources.add(group)
    masks = {}
    for key in sorted(group):
        try:
            trouble = sources.add(group[key])
            if trouble:
                raise ValueError(f"it {trouble}")
            members = np.asarray(group[key][()])
            if members.ndim != 1:
                raise ValueError(f"its shape is {members.shape}, not a list of names")
            names = [name.decode() if isinstance(name, bytes) else str(name) for name in members.tolist()]
            masks[key] = tuple(sorted(set(names) - empty, key=demo_order))
        except (*READ_ERRORS, AttributeError) as error:
            notes.append(f"filter key {key!r} cannot be read and is left out: {error}")
    return masks


def _json_attribute(group: h5py.Group, name: str, notes: list[str]) -> dict[str, Any] | None:
    if name not in group.attrs:
        return None
    try:
        text = group.attrs[name]
        value = json.loads(text if isinstance(text, (str, bytes)) else str(text))
    except READ_ERRORS as error:
        notes.append(f"{name} is not JSON and is left out: {error}")
        return None
    if not isinstance(value, dict):
        notes.append(f"{name} is not a JSON object and is left out")
        return None
    return value


def _int_attribute(group: h5py.Group, name: str) -> int | None:
    try:
        return int(group.attrs[name]) if name in group.attrs else None
    except READ_ERRORS:
        return None
