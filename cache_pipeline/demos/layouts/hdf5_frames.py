"""Reads frames and numbers of robomimic's HDF5 files, in the child process of :mod:`cache_pipeline.isolation`.

gzip chunks are read raw and decompressed by ISA-L in several threads, in half of zlib's time. ISA-L releases the GIL;
h5py decompresses one chunk at a time under its own lock. Other filters are read by h5py. Frames that are not rgb with
channels last are converted: encoded images are decoded in the same threads.
"""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import h5py
import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from cache_pipeline.demos.layouts import encoded
from cache_pipeline.demos.layouts.hdf5_links import PLUGINS, missing_filter
from cache_pipeline.demos.layouts.protocol import SourceFile, pixels_of, segment_in_words
from cache_pipeline.errors import DatasetError
from cache_pipeline.hdf5 import damage_as_error, open_file
from cache_pipeline.isolation import progress

MOST_FILES = 64

INFLATE_THREADS = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
# The shuffle filter has no effect on one-byte elements.
_INFLATABLE = ([h5py.h5z.FILTER_DEFLATE], [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE])


class _Reading(NamedTuple):
    """One segment that is being read: ``raw`` is converted into ``out`` when all futures are done."""

    words: str
    futures: list[Future[None]]
    raw: NDArray[np.uint8] | None
    out: NDArray[np.uint8]


def read_frames(
    source: SourceFile, camera: str, size: tuple[int, ...], segments: Sequence[tuple[str, int, int]]
) -> NDArray[np.uint8]:
    """Reads the frames of segments (demo, start, stop) into a new uint8 (n, H, W, 3) array, in this order.

    All segments are read together, so gzip chunks of many demos are decompressed in parallel.

    Raises:
        DatasetError: damaged frames, or a file that was removed or changed since it was opened.
    """
    out = np.empty((sum(stop - start for _, start, stop in segments), *size), np.uint8)
    file, reading, filled = _opened.file(source), list[_Reading](), 0
    for demo, start, stop in segments:
        part = out[filled : filled + stop - start]
        filled += len(part)
        progress()
        words = segment_in_words(camera, (demo, start, stop))
        with damage_as_error(source.path, words):
            images = file[f"data/{demo}/obs/{camera}"]
            reading.append(_Reading(words, *_start(images, start, part), part))
    for words, futures, raw, part in reading:
        with damage_as_error(source.path, words):
            for future in futures:
                future.result()
                progress()
            if raw is not None:
                part[:] = as_rgb(raw)
    return out


def as_rgb(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns frames of any form that ``pixels_of`` knows as (n, H, W, 3): without alpha, channels last."""
    pixels = pixels_of(images.shape)
    if pixels is None:
        raise ValueError(f"frames of the shape {images.shape[1:]} are no images")
    images = images[..., None] if pixels.axis is None else np.moveaxis(images, pixels.axis, 3)
    return np.broadcast_to(images, (*images.shape[:3], 3)) if pixels.channels == 1 else images[..., :3]


def read_numbers(source: SourceFile, demo: str, path: str) -> NDArray | None:
    """Reads one array of a demo in its own type; None if it is not there."""
    file = _opened.file(source)
    if path not in file[f"data/{demo}"]:
        return None
    item = h5py.h5d.open(file.id, f"data/{demo}/{path}".encode())
    out = np.empty(item.shape, item.dtype)
    try:
        item.read(h5py.h5s.ALL, h5py.h5s.ALL, out)
    except OSError:
        with suppress(ImportError):
            importlib.import_module(PLUGINS)  # registers further filters in this process
        item.read(h5py.h5s.ALL, h5py.h5s.ALL, out)
    return out


def close_files(sources: Sequence[SourceFile]) -> None:
    """Closes files; they reopen on the next read."""
    _opened.close(sources)


def encoded_images(images: h5py.Dataset, start: int, stop: int) -> list[bytes]:
    """Reads the rows of an array that holds one encoded image per step: as bytes of any length, or padded to one."""
    return [row.tobytes() if isinstance(row, np.ndarray) else bytes(row) for row in images[start:stop]]


class _Opened:
    """The open files of this process: at most ``MOST_FILES``, the longest unused is closed first."""

    def __init__(self) -> None:
        self._files: dict[SourceFile, h5py.File] = {}
        self._pool: ThreadPoolExecutor | None = None

    def file(self, source: SourceFile) -> h5py.File:
        """Opens a file; raises DatasetError if it has changed since the dataset was opened."""
        handle = self._files.pop(source, None)
        if handle is None:
            handle = open_file(source.path)
            try:
                source.check_unchanged()
            except DatasetError:
                handle.close()
                raise
        self._files[source] = handle
        while len(self._files) > MOST_FILES:
            self._files.pop(next(iter(self._files))).close()
        return handle

    def pool(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(INFLATE_THREADS, thread_name_prefix="inflate")
        return self._pool

    def close(self, sources: Sequence[SourceFile]) -> None:
        for source in sources:
            if (handle := self._files.pop(source, None)) is not None:
                handle.close()


_opened = _Opened()


def _start(
    images: h5py.Dataset, start: int, out: NDArray[np.uint8]
) -> tuple[list[Future[None]], NDArray[np.uint8] | None]:
    """Starts reading frames into ``out`` (n, H, W, 3); the second result, if any, is still to be converted."""
    if images.dtype != np.uint8 or images.ndim < 3:
        missing_filter(images.id.get_create_plist())
        rows = zip(encoded_images(images, start, start + len(out)), out, strict=True)
        submit = _opened.pool().submit
        return [submit(encoded.decode, data, frame, start + i) for i, (data, frame) in enumerate(rows)], None
    if images.shape[1:] == out.shape[1:]:
        return _start_reading(images, start, out, _opened.pool()), None
    raw = np.empty((len(out), *images.shape[1:]), np.uint8)
    return _start_reading(images, start, raw, _opened.pool()), raw


def _start_reading(images: h5py.Dataset, start: int, out: np.ndarray, pool: Executor) -> list[Future[None]]:
    """Fills ``out`` (n, H, W, 3) with rows [start, start + n) of uint8 (T, H, W, 3).

    ``out`` is complete when all futures are done.

    Raises (directly or in a future):
        OSError, ValueError, RuntimeError, IsalError: stored bytes are damaged or missing.
    """
    if out.size == 0:
        return []
    filters = _filters(images)
    if images.chunks is None or images.dtype != np.uint8 or filters not in _INFLATABLE:
        missing_filter(images.id.get_create_plist())  # imports hdf5plugin in a process that has not scanned the file
        images.read_direct(out, np.s_[start : start + len(out)])
        return []
    chunks = images.chunks
    first = range(start - start % chunks[0], start + len(out), chunks[0])
    rest = (range(0, n, c) for n, c in zip(images.shape[1:], chunks[1:], strict=True))
    deflate = 1 << filters.index(h5py.h5z.FILTER_DEFLATE)
    return [
        pool.submit(_inflate, images.id, corner, chunks, deflate, start, out)
        for corner in itertools.product(first, *rest)
    ]


def _filters(images: h5py.Dataset) -> list[int]:
    plist = images.id.get_create_plist()
    return [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]


def _inflate(
    images: h5py.h5d.DatasetID,
    corner: tuple[int, ...],
    chunks: tuple[int, ...],
    deflate: int,
    start: int,
    out: np.ndarray,
) -> None:
    """Decompresses one chunk into its place; bits of ``skipped`` mark filters that were not applied to the chunk."""
    skipped, stored = images.read_direct_chunk(corner)
    plain = stored if skipped & deflate else isal_zlib.decompress(stored, bufsize=int(np.prod(chunks)))
    here, there = _overlap(corner, chunks, start, out.shape)
    out[there] = np.frombuffer(plain, np.uint8).reshape(chunks)[here]


def _overlap(
    corner: tuple[int, ...], chunks: tuple[int, ...], start: int, shape: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Returns the needed part of a chunk, and its place in an output of ``shape`` whose first row is ``start``."""
    origin = (corner[0] - start, *corner[1:])
    low = [max(at, 0) for at in origin]
    high = [min(at + n, end) for at, n, end in zip(origin, chunks, shape, strict=True)]
    here = tuple(slice(a - at, b - at) for a, b, at in zip(low, high, origin, strict=True))
    return here, tuple(slice(a, b) for a, b in zip(low, high, strict=True))
