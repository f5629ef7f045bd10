"""Freed memory stays with the process while the same work is done again and again."""

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
# Where glibc's own adaptation ends after one large allocation was freed; setting any of them switches it off.
USUAL = {MMAP_MAX: 65536, MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20, ARENA_MAX: 0}

_lock = threading.Lock()
_within = 0


@contextmanager
def retained_memory() -> Iterator[None]:
    """Within, what is freed is not given back to the system; at the end it is, and glibc does as it usually does.

    A batch of feature maps takes tens of megabytes that glibc maps for each layer and unmaps after it, and the
    system's work to hand out fresh pages is then a tenth of the time. For the whole process, so that threads begun
    within use the memory of the others; may be nested. Without glibc it does nothing.
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
    """A function of glibc's; None elsewhere."""
    if platform.libc_ver()[0] != "glibc":
        return None
    return cast("Callable[..., int] | None", getattr(ctypes.CDLL(None), name, None))
