"""Bulk reading of frames from one HDF5 dataset.

gzip chunks are fetched raw and inflated in a few threads: zlib releases the interpreter lock, while h5py inflates one
chunk at a time under its own. Any other layout or filter goes through h5py.
"""

from __future__ import annotations

import itertools
import os
import zlib
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np

INFLATE_THREADS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
# Shuffling bytes does nothing to elements of one byte.
_INFLATABLE = ({h5py.h5z.FILTER_DEFLATE}, {h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE})


def read_frames(images: h5py.Dataset, start: int, stop: int, pool: ThreadPoolExecutor | None = None) -> np.ndarray:
    """Reads rows [start, stop) of uint8 (T, H, W, 3) as a new array.

    Raises:
        OSError, ValueError, RuntimeError, zlib.error: stored bytes are damaged or missing.
    """
    out = np.empty((stop - start, *images.shape[1:]), np.uint8)
    if out.size == 0:
        return out
    if not _inflatable(images) or not _inflate_into(images, start, out, pool):
        images.read_direct(out, np.s_[start:stop])
    return out


def _inflatable(images: h5py.Dataset) -> bool:
    if images.chunks is None or images.dtype != np.uint8:
        return False
    plist = images.id.get_create_plist()
    return {plist.get_filter(i)[0] for i in range(plist.get_nfilters())} in _INFLATABLE


def _inflate_into(images: h5py.Dataset, start: int, out: np.ndarray, pool: ThreadPoolExecutor | None) -> bool:
    """Fills ``out`` from row ``start`` on; false where a chunk was stored without its filters."""
    chunks, stop = images.chunks, start + len(out)
    first = range(start - start % chunks[0], stop, chunks[0])
    rest = (range(0, n, c) for n, c in zip(images.shape[1:], chunks[1:], strict=True))
    size = int(np.prod(chunks))

    def inflate(corner: tuple[int, ...]) -> bool:
        mask, stored = images.id.read_direct_chunk(corner)
        if mask:
            return False
        values = np.frombuffer(zlib.decompress(stored, bufsize=size), np.uint8).reshape(chunks)
        here, there = _overlap(corner, chunks, start, out.shape)
        out[there] = values[here]
        return True

    corners = list(itertools.product(first, *rest))
    if pool is None or len(corners) == 1:
        return all(map(inflate, corners))
    return all(list(pool.map(inflate, corners)))


def _overlap(
    corner: tuple[int, ...], chunks: tuple[int, ...], start: int, shape: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Which part of a chunk is wanted, and where it goes in an output of ``shape`` whose first row is ``start``."""
    origin = (corner[0] - start, *corner[1:])
    low = [max(at, 0) for at in origin]
    high = [min(at + n, end) for at, n, end in zip(origin, chunks, shape, strict=True)]
    here = tuple(slice(a - at, b - at) for a, b, at in zip(low, high, origin, strict=True))
    return here, tuple(slice(a, b) for a, b in zip(low, high, strict=True))
