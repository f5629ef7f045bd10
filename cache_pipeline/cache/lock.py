"""Locks a local folder for one writer; the system releases the lock when the process dies.

An object store has no locks: there, writing the manifest is what only one of two writers can do (``manifest.py``).
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cache_pipeline.cache.store import FolderStore, Place, is_remote, store_at
from cache_pipeline.cache.store_protocol import Store
from cache_pipeline.errors import CacheLockedError, CachePipelineError, ConfigError
from cache_pipeline.files import resolved


def lock_file(path: str | Path) -> Path:
    """Returns the lock file of a cache or run. It lies beside the folder, so that the folder can be swapped."""
    real = resolved(path)
    if not real.name:
        raise ConfigError(f"{path} is the root folder and cannot be a cache or run; choose another path")
    return real.with_name(f".{real.name}.lock")


@contextmanager
def writer_lock(path: str | Path, refusal: type[CachePipelineError] = CacheLockedError) -> Iterator[Path]:
    """Holds the writer lock of the folder at ``path``; yields its real path, which the caller uses from then on.

    Args:
        refusal: the error type to raise if another live process holds the lock; the message names that process.

    Raises:
        OSError: the parent folder cannot be written.
    """
    real = resolved(path)
    file = lock_file(real)
    descriptor = _acquire(file, path, refusal)
    try:
        yield real
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def writing(place: Place) -> Iterator[Store]:
    """Yields the store of a cache that is to be written, with the writer's lock on its real path if it is a folder."""
    store = store_at(place)
    if is_remote(store):
        yield store
        return
    with writer_lock(Path(store.place)) as real:
        yield FolderStore(real)


def _acquire(file: Path, path: str | Path, refusal: type[CachePipelineError]) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise refusal(
                f"{path} is being written by {holder}; wait for it or stop it, then run the command again"
            ) from error
        if _is_same_file(descriptor, file):
            with suppress(OSError):  # on a full disk the lock holds without the name of its holder
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
            return descriptor
        os.close(descriptor)  # the previous holder removed the file between open and lock


def _holder(descriptor: int) -> str:
    try:
        value = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {value['pid']} on {value['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _is_same_file(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
