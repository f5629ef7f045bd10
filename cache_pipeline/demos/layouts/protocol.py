"""The protocol of dataset layouts, and what they report of a dataset.

A layout is a module: one way to keep demos on disk. Its functions that read run in the child process of
:mod:`cache_pipeline.isolation`, because a damaged file can crash the library that reads it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.errors import DatasetError
from cache_pipeline.files import digest

ACTIONS = "actions"
"""Path of the actions of a demo unless the user names others, whatever a layout calls them."""
HDF5 = "hdf5"
"""Name of the layout of robomimic's HDF5 files: the only one of early versions, so records leave it out."""
# Largest number of values per step of an array with several axes that counts as low-dim by default: poses and key
# points, not depth images.
MOST_FLAT = 256


# Folders of a dataset folder that hold its data.
FOLDERS = ("meta", "data", "videos")


class Pixels(NamedTuple):
    """Where the frames of a uint8 array have their height, width and channels; ``axis`` of channels is 3, 1 or None."""

    height: int
    width: int
    channels: int
    axis: int | None


def pixels_of(shape: tuple[int, ...]) -> Pixels | None:
    """Reads from the shape of a uint8 array whether its rows are frames: rgb or rgba, channels last or first, or grey.

    Grey frames have more than ``MOST_FLAT`` pixels, so that small blocks of numbers stay low-dim.
    """
    if len(shape) == 4 and shape[3] in (3, 4):
        return Pixels(shape[1], shape[2], shape[3], 3)
    if len(shape) == 4 and shape[1] in (3, 4):
        return Pixels(shape[2], shape[3], shape[1], 1)
    if len(shape) not in (3, 4) or math.prod(shape[1:]) <= MOST_FLAT:
        return None
    if len(shape) == 3:
        return Pixels(shape[1], shape[2], 1, None)
    if shape[3] == 1:
        return Pixels(shape[1], shape[2], 1, 3)
    return Pixels(shape[2], shape[3], 1, 1) if shape[1] == 1 else None


class ArrayInfo(NamedTuple):
    """One array of a demo, with one row per step.

    ``compression`` is ``none``, ``gzip-4``, ``JPEG``, …; ``written``: all its bytes are there; ``trouble``: why it
    cannot be read, such as a missing filter; ``encoded``: (height, width) of the first frame of an array that holds one
    encoded image per step.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...] | None
    compression: str
    stored_bytes: int
    written: bool
    trouble: str = ""
    encoded: tuple[int, int] | None = None

    @property
    def frame(self) -> tuple[int, int, int] | None:
        """(H, W, 3) of its frames as they are read, or None if it does not hold images."""
        if self.encoded is not None:
            return (*self.encoded, 3)
        pixels = pixels_of(self.shape) if self.dtype == np.uint8 else None
        return None if pixels is None else (pixels.height, pixels.width, 3)

    @property
    def form(self) -> str:
        """How its frames differ from rgb with channels last, in words; empty if they do not."""
        pixels = pixels_of(self.shape) if self.encoded is None and self.dtype == np.uint8 else None
        if pixels is None:
            return ""
        kinds = {1: "grey, read as three equal channels", 4: "RGBA, read without alpha"}
        words = (kinds.get(pixels.channels), "channels first" if pixels.axis == 1 and pixels.channels > 1 else None)
        return ", ".join(word for word in words if word)

    @property
    def is_image(self) -> bool:
        """Whether its rows are images: uint8 frames of any form, or encoded ones."""
        return self.frame is not None

    @property
    def is_picture(self) -> bool:
        """Whether it has the shape of images, (T, H, W, channels) or (T, channels, H, W)."""
        return len(self.shape) == 4 and (self.shape[-1] in (1, 3, 4) or self.shape[1] in (1, 3, 4))

    @property
    def is_numbers(self) -> bool:
        """Whether it holds numbers per step and is not an image: the user may name it as a low-dim key."""
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

    @property
    def step_shape(self) -> tuple[int, ...]:
        """Shape of one step as it is read."""
        return self.frame or self.shape[1:]

    def __str__(self) -> str:
        if self.encoded is not None:
            return f"{self.compression} per step ({self.shape[0]})"
        return f"{self.dtype} ({', '.join(map(str, self.shape))})"


class DemoInfo(NamedTuple):
    """One demo; ``arrays`` maps ``actions``, ``rewards``, ``dones`` and ``obs/<key>`` to their metadata."""

    name: str
    arrays: dict[str, ArrayInfo]
    num_samples: int | None
    odd_num_samples: bool = False
    """Whether the file has a ``num_samples`` that is not a whole number."""
    other_actions: tuple[str, ...] = ()
    """Other arrays that could be actions, such as ``actions_abs``; their metadata are in ``arrays``."""
    task: str | None = None
    """The task in words, if the dataset says it."""

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
        """Reads the current size and time of a file.

        The size of a dataset folder is that of all its files; in place of the time it has a digest of their names,
        sizes and times.
        """
        if path.is_dir():
            return cls(path.absolute(), *_local_state(path))
        stat = path.stat()
        return cls(path.absolute(), stat.st_size, stat.st_mtime_ns)


def _local_state(path: Path) -> tuple[int, int]:
    files = [file for part in FOLDERS for file in (path / part).rglob("*") if file.is_file()]
    return folder_state(
        [(file.relative_to(path).as_posix(), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    )


def folder_state(files: Sequence[tuple[str, int, int]]) -> tuple[int, int]:
    """Returns the total size of the files that hold a dataset, and a digest of their (name, size, time)."""
    states = sorted(files, key=lambda state: state[0].split("/"))
    listing = "\n".join(f"{name}\0{size}\0{time}" for name, size, time in states)
    return sum(size for _, size, _ in states), int(digest(listing.encode("utf-8", "surrogateescape"))[:14], 16)


class SourceFile(NamedTuple):
    """Size and time of one dataset when it was opened; ``path`` is absolute, ``linked`` are the files it links to.

    ``layout`` is the name of its layout. ``decoder`` is the library that decodes its frames, with its version; it is
    empty if frames are stored as they are read.
    """

    path: Path
    size: int
    mtime_ns: int
    linked: tuple[FileStamp, ...] = ()
    layout: str = HDF5
    decoder: str = ""

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
    """One dataset: demos in numeric order, filter keys, problems (unreadable items) and notes (unusual items).

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
    layout: str = HDF5
    decoder: str = ""
    kind: str = "robomimic HDF5"
    """The layout in words, such as ``LIBERO HDF5`` or ``LeRobot v3.0``."""

    @property
    def source(self) -> SourceFile:
        """The dataset as reading functions take it."""
        return SourceFile(self.path.absolute(), self.size, self.mtime_ns, self.linked, self.layout, self.decoder)

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


def segment_in_words(camera: str, segment: tuple[str, int, int]) -> str:
    """Returns what a segment (demo, start, stop) holds, for messages."""
    demo, start, stop = segment
    return f"{demo}: {camera!r} between frames {start} and {stop}"


class Layout(Protocol):
    """One way to keep demos on disk. ``frames``, ``numbers`` and ``close`` are called in the child process."""

    NAME: str
    """Name in records, such as ``hdf5``."""

    def detect(self, path: Path) -> bool:
        """Whether the content of a file or folder has this layout. Reads little, and crashes on nothing."""

    def scan(self, path: Path) -> FileInfo:
        """Reads names, shapes, types, filter keys and task texts, but no frames.

        Raises:
            DatasetError: nothing can be read. Other findings are recorded in the result.
        """

    def decoder(self) -> str:
        """Returns the libraries that decode its frames now, with their versions."""

    def frames(
        self, source: SourceFile, camera: str, size: tuple[int, ...], segments: Sequence[tuple[str, int, int]]
    ) -> NDArray[np.uint8]:
        """Reads the frames of segments (demo, start, stop) into a new uint8 (n, H, W, 3) array, in this order."""

    def numbers(self, source: SourceFile, demo: str, path: str) -> NDArray | None:
        """Reads one array of a demo in its own type; None if the demo does not have it."""

    def findings(self, source: SourceFile, demos: Sequence[str]) -> tuple[list[str], list[str]]:
        """Returns problems and notes of some demos that need more than metadata, such as timestamps with gaps."""

    def close(self, sources: Sequence[SourceFile]) -> None:
        """Closes what is open; it opens again on the next read."""
