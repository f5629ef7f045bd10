"""Reads the metadata of one robomimic HDF5 file.

    data/<demo>/{obs/<key>, actions, rewards, dones}    mask/<filter key>    data.attrs: env_args, render_flags, total

``scan_file`` raises only if nothing can be read. It records other findings, which ``checks.py`` evaluates.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from cache_pipeline.demos.links import (
    SourceFiles,
    broken_link,
    is_written,
    other_filters,
)
from cache_pipeline.errors import DatasetError
from cache_pipeline.hdf5 import READ_ERRORS, damage_as_error, open_file
from cache_pipeline.isolation import isolated, progress
from cache_pipeline.text import listed

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
    odd_num_samples: bool = False
    """Whether the file has a ``num_samples`` that is not a whole number."""
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


def scan_file(path: str | Path) -> FileInfo:
    """Reads names, shapes, types, filter keys and attributes, but no array content, in the child process.

    Raises:
        DatasetError: the file cannot be opened, has no ``data`` group, or has no demos.
    """
    path = Path(path).expanduser()
    with damage_as_error(path):
        return isolated(_scan_file, path)


def _scan_file(path: Path) -> FileInfo:
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
            there = listed(file, limit=8) or "nothing"
            raise DatasetError(f"{path} has no group 'data' (it holds {there}); is it a robomimic dataset?")
        demos = []
        for name in sorted(data, key=demo_order):
            progress()
            group = _get(data, name)
            if isinstance(group, h5py.Group):
                demos.append(_scan_demo(group, name, problems, sources))
            else:
                broken = broken_link(data, name) if group is None else None
                problems.append(f"{name}: data/{name} {broken or 'is not a group, so it is not a demo'}")
        sources.add(data.id)
        if not demos:
            raise DatasetError(f"{path} holds no demos: its group 'data' is empty; collect demos first")
        empty = tuple(demo.name for demo in demos if demo.empty and not _is_reported(demo, problems))
        if len(empty) == len(demos):
            raise DatasetError(f"{path} holds no steps: all of its {len(demos)} demos are empty; collect demos first")
        total, odd_total = _count_attribute(data, "total")
        if odd_total:
            notes.append("data.attrs total is not a whole number and is left out")
        return FileInfo(
            path=path,
            size=stat.st_size,
            mtime_ns=stat.st_mtime_ns,
            demos=tuple(demo for demo in demos if demo.name not in empty),
            masks=_scan_masks(file, set(empty), notes, sources),
            env_args=_json_attribute(data, "env_args", notes),
            render_flags=_json_attribute(data, "render_flags", notes),
            total=total,
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
    sources.add(group.id)
    members = [key.decode() for key in group.id]
    paths = [path for path in STEP_ARRAYS if path in members]
    obs = _get(group, "obs") if "obs" in members else None
    if isinstance(obs, h5py.Group):
        sources.add(obs.id)
        paths += [f"obs/{key}" for key in sorted(obs)]
    elif obs is None and (broken := broken_link(group, "obs")):
        problems.append(f"{name}: obs {broken}")
    arrays = {}
    for path in paths:
        try:
            item = h5py.h5o.open(group.id, path.encode())
            if isinstance(item, h5py.h5d.DatasetID):
                arrays[path] = _scan_array(item, sources)
        except READ_ERRORS as error:
            parent, _, key = path.rpartition("/")
            broken = broken_link(group[parent] if parent else group, key)
            problems.append(f"{name}: {path} cannot be read" + (f": it {broken}" if broken else f" ({error})"))
    others = tuple(key for key in members if "action" in key and key != "actions")
    return DemoInfo(name, arrays, *_count_attribute(group, "num_samples"), others)


def _scan_array(item: h5py.h5d.DatasetID, sources: SourceFiles) -> ArrayInfo:
    plist, shape = item.get_create_plist(), tuple(item.shape or ())
    trouble = sources.add_dataset(item, plist)
    chunks = plist.get_chunk() if plist.get_layout() == h5py.h5d.CHUNKED else None
    compression = _compression(h5py.Dataset(item)) if plist.get_nfilters() else "none"
    written = not trouble and is_written(item, plist, shape)
    return ArrayInfo(shape, item.dtype, chunks, compression, item.get_storage_size(), written, trouble)


def _compression(item: h5py.Dataset) -> str:
    if item.compression is None:
        return next(iter(other_filters(item.id.get_create_plist()).values()), "none")
    return item.compression if item.compression_opts is None else f"{item.compression}-{item.compression_opts}"


def _scan_masks(file: h5py.File, empty: set[str], notes: list[str], sources: SourceFiles) -> dict[str, tuple[str, ...]]:
    group = _get(file, "mask")
    if not isinstance(group, h5py.Group):
        return {}
    sources.add(group.id)
    masks = {}
    for key in sorted(group):
        try:
            item = group[key]
            if not isinstance(item, h5py.Dataset):
                raise ValueError("it is not a list of names")
            if trouble := sources.add_dataset(item.id, item.id.get_create_plist()):
                raise ValueError(f"it {trouble}")
            members = np.asarray(item[()])
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
        value = json.loads(text if isinstance(text, (str, bytes)) else str(text), parse_constant=_not_json)
    except (*READ_ERRORS, RecursionError) as error:
        notes.append(f"{name} is not JSON and is left out: {error}")
        return None
    if not isinstance(value, dict):
        notes.append(f"{name} is not a JSON object and is left out")
        return None
    return value


def _not_json(name: str) -> None:
    raise ValueError(f"it holds {name}, which JSON does not have")


def _count_attribute(group: h5py.Group, name: str) -> tuple[int | None, bool]:
    """Returns a number of steps, None if it is absent or not a whole number, and whether it is there but is not one."""
    try:
        if name not in group.attrs:
            return None, False
        value = np.asarray(group.attrs[name])
        if value.size == 1 and value.dtype.kind in "iufb" and value.item() == (count := int(value.item())):
            return count, False
    except (*READ_ERRORS, OverflowError):
        pass
    return None, True
