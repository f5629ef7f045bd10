"""Bulk reading of frames from HDF5 datasets.

gzip chunks are read raw and decompressed by ISA-L in several threads, in half of zlib's time. ISA-L releases the GIL;
h5py decompresses one chunk at a time under its own lock. Other layouts and filters are read by h5py.
"""

from __future__ import annotations

import itertools
import os
from concurrent.futures import Executor, Future

import h5py
import numpy as np
from isal import isal_zlib

from cache_pipeline.demos.links import missing_filter

INFLATE_THREADS = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
# The shuffle filter has no effect on one-byte elements.
_INFLATABLE = ([h5py.h5z.FILTER_DEFLATE], [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE])


def start_reading(images: h5py.Dataset, start: int, out: np.ndarray, pool: Executor) -> list[Future[None]]:
    """Fills ``out`` (n, H, W, 3) with rows [start, start + n) of uint8 (T, H, W, 3).

    ``out`` is complete when all futures are done.

    Raises (directly or in a future):
        OSError, ValueError, RuntimeError, IsalError: stored bytes are damaged or missing.
    """
    if out.size == 0:
        return []
    filters = _filters(images)
    if images.chunks is None or images.dtype != np.uint8 or filters not in _INFLATABLE:
        missing_filter(images)  # imports hdf5plugin in a process that has not scanned the file
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
