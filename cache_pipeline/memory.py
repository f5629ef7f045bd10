"""Keeps freed memory in the process during repeated work."""

from __future__ import annotations

import ctypes
import functools
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

MMAP_MAX, TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -4, -1, -3, -8
KEEP = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, ARENA_MAX: 1}
# glibc adapts these thresholds by itself until one is set. These are the values that it adapts to.
USUAL = {MMAP_MAX: 65536, MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20, ARENA_MAX: 0}

_lock = threading.Lock()
_within = 0


@contextmanager
def retained_memory() -> Iterator[None]:
    """Keeps freed memory in the process inside the ``with`` block; returns it to the system at the end.

    A batch of feature maps takes tens of megabytes. By default glibc maps them for each layer and unmaps them after
    it; the page faults then take about 10 % of the time. The setting holds for the whole process: threads that start
    inside the block share one heap. May be nested. Without glibc it does nothing.
    """
    global _within
    with _lock:
        _within += 1
        if _within == 1:
            _set(KEEP)
    try:
        yield
    finally:
        with _lock:
            _within -= 1
            if _within == 0:
                _set(USUAL)
                _trim()


def _set(options: dict[int, int]) -> None:
    mallopt = _function("mallopt")
    if mallopt is not None:
        for option, value in options.items():
            mallopt(option, value)


def _trim() -> None:
    malloc_trim = _function("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


@functools.cache
def _function(name: str) -> Callable[..., int] | None:
    """Returns a function of glibc, or None on other C libraries."""
    if platform.libc_ver()[0] != "glibc":
        return None
    return cast("Callable[..., int] | None", getattr(ctypes.CDLL(None), name, None))
