"""The layout of robomimic's HDF5 files, which robosuite, MimicGen, RoboCasa, LIBERO and Isaac Lab share.

    data/<demo>/{obs/<key>, actions, rewards, dones}    mask/<filter key>    data.attrs: env_args, render_flags, total

``scan`` raises only if nothing can be read. It records other findings, which ``checks.py`` evaluates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cache_pipeline.demos.layouts import encoded
from cache_pipeline.demos.layouts.hdf5_attributes import count_attribute, flipped_frames, json_attribute, task_text
from cache_pipeline.demos.layouts.hdf5_frames import close_files, encoded_images, read_frames, read_numbers
from cache_pipeline.demos.layouts.hdf5_links import SourceFiles, broken_link, is_written, other_filters
from cache_pipeline.demos.layouts.protocol import (
    ACTIONS,
    HDF5,
    ArrayInfo,
    DemoInfo,
    FileInfo,
    FileStamp,
    SourceFile,
    demo_order,
)
from cache_pipeline.errors import DatasetError
from cache_pipeline.hdf5 import READ_ERRORS, damage_as_error, holds_hdf5, open_file
from cache_pipeline.isolation import isolated, progress
from cache_pipeline.text import listed

NAME = HDF5
STEP_ARRAYS = (ACTIONS, "rewards", "dones")
# Fewest bytes of an encoded image: shorter rows of bytes are numbers.
LEAST_ENCODED = 64
UPSIDE_DOWN = (
    "macros_image_convention is opengl: frames are stored upside down, as LIBERO's environment also gives them; "
    "--flip turns them upright, in extraction and in every policy trained on it"
)

frames, numbers, close = read_frames, read_numbers, close_files


def detect(path: Path) -> bool:
    """Whether a file is HDF5."""
    return holds_hdf5(path)


def decoder() -> str:
    """Returns the libraries that decode encoded frames, with their versions."""
    return encoded.decoder()


def findings(source: SourceFile, demos: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns no problems and no notes: metadata and numbers tell all."""
    return [], []


def scan(path: Path) -> FileInfo:
    """Reads names, shapes, types, filter keys and attributes, but no frames, in the child process.

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
        demos, task = [], task_text(data)
        for name in sorted(data, key=demo_order):
            progress()
            group = _get(data, name)
            if isinstance(group, h5py.Group):
                demos.append(_scan_demo(group, name, problems, sources, task))
            else:
                broken = broken_link(data, name) if group is None else None
                problems.append(f"{name}: data/{name} {broken or 'is not a group, so it is not a demo'}")
        sources.add(data.id)
        if not demos:
            raise DatasetError(f"{path} holds no demos: its group 'data' is empty; collect demos first")
        empty = tuple(demo.name for demo in demos if demo.empty and not _is_reported(demo, problems))
        if len(empty) == len(demos):
            raise DatasetError(f"{path} holds no steps: all of its {len(demos)} demos are empty; collect demos first")
        total, odd_total = count_attribute(data, "total")
        if odd_total:
            notes.append("data.attrs total is not a whole number and is left out")
        if flipped_frames(data):
            notes.append(UPSIDE_DOWN)
        decodes = any(info.encoded for demo in demos for info in demo.arrays.values())
        return FileInfo(
            path=path,
            size=stat.st_size,
            mtime_ns=stat.st_mtime_ns,
            demos=tuple(demo for demo in demos if demo.name not in empty),
            masks=_scan_masks(file, set(empty), notes, sources),
            env_args=json_attribute(data, "env_args", notes),
            render_flags=json_attribute(data, "render_flags", notes),
            total=total,
            problems=tuple(problems),
            notes=tuple(notes),
            empty=empty,
            linked=tuple(FileStamp.of(other) for other in sources.found if not other.samefile(path)),
            decoder=decoder() if decodes else "",
            kind=_kind(data),
        )


def _kind(data: h5py.Group) -> str:
    """Returns the recorder of a file in words, from attributes that only it writes."""
    if "problem_info" in data.attrs or "bddl_file_name" in data.attrs:
        return "LIBERO HDF5"
    first = _get(data, min(data, key=demo_order))
    if isinstance(first, h5py.Group) and "initial_state" in first:
        return "Isaac Lab HDF5"
    return "RoboCasa HDF5" if isinstance(first, h5py.Group) and "ep_meta" in first.attrs else "robomimic HDF5"


def _is_reported(demo: DemoInfo, problems: list[str]) -> bool:
    """Whether ``problems`` already names an unreadable array of the demo: it is damaged, not empty."""
    return any(problem.startswith(f"{demo.name}: ") for problem in problems)


def _get(group: h5py.Group, name: str) -> Any:
    try:
        return group[name]
    except READ_ERRORS:
        return None


def _scan_demo(group: h5py.Group, name: str, problems: list[str], sources: SourceFiles, task: str | None) -> DemoInfo:
    sources.add(group.id)
    members = [key.decode() for key in group.id]
    paths = [path for path in STEP_ARRAYS if path in members]
    obs = _get(group, "obs") if "obs" in members else None
    if isinstance(obs, h5py.Group):
        sources.add(obs.id)
        paths += [f"obs/{key}" for key in sorted(obs)]
    elif obs is None and (broken := broken_link(group, "obs")):
        problems.append(f"{name}: obs {broken}")
    arrays, others = {}, tuple(_other_actions(group, members))
    for path in (*paths, *others):
        try:
            item = h5py.h5o.open(group.id, path.encode())
            if isinstance(item, h5py.h5d.DatasetID):
                arrays[path] = _scan_array(item, sources)
        except READ_ERRORS as error:
            parent, _, key = path.rpartition("/")
            broken = broken_link(group[parent] if parent else group, key)
            problems.append(f"{name}: {path} cannot be read" + (f": it {broken}" if broken else f" ({error})"))
    here = tuple(path for path in others if path in arrays)
    return DemoInfo(name, arrays, *count_attribute(group, "num_samples"), here, task_text(group) or task)


def _other_actions(group: h5py.Group, members: list[str]) -> Iterator[str]:
    """Yields the paths of arrays with ``action`` in their name, or inside a group of such a name."""
    for key in members:
        if "action" in key and key != ACTIONS:
            item = _get(group, key)
            if isinstance(item, h5py.Group):
                yield from (f"{key}/{name}" for name in sorted(item))
            elif isinstance(item, h5py.Dataset):
                yield key


def _scan_array(item: h5py.h5d.DatasetID, sources: SourceFiles) -> ArrayInfo:
    plist, shape = item.get_create_plist(), tuple(item.shape or ())
    trouble = sources.add_dataset(item, plist)
    chunks = plist.get_chunk() if plist.get_layout() == h5py.h5d.CHUNKED else None
    compression = _compression(h5py.Dataset(item)) if plist.get_nfilters() else "none"
    written = not trouble and is_written(item, plist, shape)
    header = _first_header(h5py.Dataset(item), shape) if written else None
    if header is not None:
        size = (header.height, header.width)
        stored = _encoded_bytes(h5py.Dataset(item))
        return ArrayInfo(shape, item.dtype, chunks, header.format, stored, written, trouble, size)
    return ArrayInfo(shape, item.dtype, chunks, compression, item.get_storage_size(), written, trouble)


def _first_header(item: h5py.Dataset, shape: tuple[int, ...]) -> encoded.Header | None:
    """Returns format and size of the first image of an array that holds one encoded image per step, else None."""
    padded = item.dtype == np.uint8 and len(shape) == 2 and shape[1] >= LEAST_ENCODED
    if not (padded or (_is_bytes(item.dtype) and len(shape) == 1)) or not shape[0]:
        return None
    if padded and not encoded.has_signature(item[0, : encoded.LONGEST_SIGNATURE].tobytes()):
        return None
    return encoded.read_header(encoded_images(item, 0, 1)[0])


def _is_bytes(dtype: np.dtype) -> bool:
    """Whether each value is a string of bytes: of variable length, or of one length."""
    kind = h5py.check_vlen_dtype(dtype)
    return (kind is not None and np.dtype(kind).itemsize == 1) or h5py.check_string_dtype(dtype) is not None


def _encoded_bytes(item: h5py.Dataset) -> int:
    """Returns the size of encoded images; that of images of variable length is estimated from the first."""
    if item.dtype.kind != "O":
        return int(item.id.get_storage_size())
    return len(item) * len(encoded_images(item, 0, 1)[0])


def _compression(item: h5py.Dataset) -> str:
    if item.compression in (None, "unknown"):  # h5py's answer for other filters, by its release
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
