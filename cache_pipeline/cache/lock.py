"""Locks a local folder or file for one writer, or a folder for several processes that write one cache together.

The system releases the lock when the last process that has it dies. An object store has no locks: there, writing the
manifest is what only one of two writers can do (``manifest_store.py``).
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from cache_pipeline.cache.store import FolderStore, Place, is_remote, store_at
from cache_pipeline.cache.store_protocol import Store
from cache_pipeline.errors import CacheLockedError, CachePipelineError, ConfigError
from cache_pipeline.files import lives, resolved

logger = logging.getLogger("cache_pipeline")

# Error numbers of file systems that are mounted without locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
PAUSE_S = 0.05
DEAD_HOLDER_S = 60.0
"""Time for the worker processes of a dead holder to end. They share its lock, and may still be importing torch."""
UNTOLD_HOLDER_S = 2.0
"""Time for a new holder to write its name into the lock file."""


def lock_file(path: str | Path) -> Path:
    """Returns the lock file of a cache or run. It lies beside the folder, so that the folder can be swapped."""
    real = resolved(path)
    if not real.name:
        raise ConfigError(f"{path} is the root folder and cannot be a cache or run; choose another path")
    return real.with_name(f".{real.name}.lock")


_held: dict[Path, int] = {}


def lock_descriptor(store: Store) -> int | None:
    """Returns the descriptor of the lock that this process holds on a cache; None on an object store.

    A child process that inherits it keeps the folder locked as long as it lives.
    """
    return _held[store.place] if isinstance(store.place, Path) else None


@contextmanager
def writer_lock(path: str | Path, refusal: type[CachePipelineError] = CacheLockedError) -> Iterator[Path]:
    """Holds the writer lock of the folder or file at ``path``; yields its real path, for use from then on.

    Args:
        refusal: the error type to raise if another live process holds the lock; the message names that process.

    Raises:
        OSError: the parent folder cannot be written.
    """
    real = resolved(path)
    file = lock_file(real)
    descriptor = _acquire(file, path, refusal)
    _held[real] = descriptor
    try:
        yield real
    finally:
        _held.pop(real, None)
        file.unlink(missing_ok=True)
        os.close(descriptor)


def lock_if_possible(path: Path, refusal: type[CachePipelineError], held: ExitStack) -> None:
    """Holds the writer lock of ``path`` until ``held`` is closed; warns on a file system without locks.

    Raises:
        refusal: another live process holds the lock.
        OSError: the parent folder cannot be written.
    """
    try:
        held.enter_context(writer_lock(path, refusal))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logger.warning("%s is on a file system without locks: make sure that no other process writes it", path)


@contextmanager
def writing(place: Place) -> Iterator[Store]:
    """Yields the store of a cache that is to be written, with the writer's lock on its real path if it is a folder."""
    store = store_at(place)
    if is_remote(store):
        yield store
        return
    with writer_lock(Path(store.place)) as real:
        yield FolderStore(real)


class SharedLock:
    """The lock of one of several processes that write a cache together.

    Attributes:
        alone: whether no other process holds the lock. The others wait until :meth:`let_others_in`.
    """

    def __init__(self, descriptor: int | None, alone: bool) -> None:
        self.descriptor, self.alone = descriptor, alone

    def let_others_in(self) -> None:
        """Shares the lock from now on."""
        if self.alone and self.descriptor is not None:
            fcntl.flock(self.descriptor, fcntl.LOCK_SH)
            self.alone = False


@contextmanager
def shared_writing(store: Store) -> Iterator[SharedLock]:
    """Holds the lock of a cache together with other processes that call this function; waits while one is ``alone``.

    An object store has no locks: there each is ``alone``, and the claim of the manifest keeps others out.

    Args:
        store: the cache, at its real path.

    Raises:
        CacheLockedError: a process holds the writer lock.
        OSError: the parent folder cannot be written.
    """
    real = store.place
    if not isinstance(real, Path):
        yield SharedLock(None, alone=True)
        return
    file = lock_file(real)
    descriptor, alone = _share(file, real)
    lock = SharedLock(descriptor, alone)
    _held[real] = descriptor
    try:
        yield lock
    finally:
        _held.pop(real, None)
        if lock.alone or _take(descriptor, fcntl.LOCK_EX):  # the last one removes the file
            file.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(file: Path, path: str | Path, refusal: type[CachePipelineError]) -> int:
    started = time.monotonic()
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        if _take(descriptor, fcntl.LOCK_EX):
            if _is_same_file(descriptor, file):
                _sign(descriptor, shared=False)
                return descriptor
            os.close(descriptor)  # the previous holder removed the file between open and lock
            continue
        holder = _holder(descriptor)
        os.close(descriptor)
        if not _is_dead(holder) or time.monotonic() - started > DEAD_HOLDER_S:
            raise refusal(
                f"{path} is being written by {_named(holder)}; wait for it or stop it, then run the command again"
            )
        time.sleep(PAUSE_S)


def _share(file: Path, path: Path) -> tuple[int, bool]:
    started = time.monotonic()
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        alone = _take(descriptor, fcntl.LOCK_EX)
        if alone or _take(descriptor, fcntl.LOCK_SH):
            if _is_same_file(descriptor, file):
                _sign(descriptor, shared=True)
                return descriptor, alone
            os.close(descriptor)
            continue
        holder = _holder(descriptor)
        os.close(descriptor)
        patience = DEAD_HOLDER_S if _is_dead(holder) else UNTOLD_HOLDER_S
        if not holder.get("shared") and time.monotonic() - started > patience:
            raise CacheLockedError(
                f"{path} is being written by {_named(holder)}, not in parts; wait for it or stop it, then run the "
                "command again"
            )
        time.sleep(PAUSE_S)


def _take(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sign(descriptor: int, *, shared: bool) -> None:
    value = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "shared": shared}).encode()
    with suppress(OSError):  # on a full disk the lock holds without the name of its holder
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, value, 0)


def _holder(descriptor: int) -> dict[str, Any]:
    """Returns what the holder wrote, or an empty object."""
    try:
        value = json.loads(os.pread(descriptor, 4096, 0))
        return value if isinstance(value["pid"], int) and isinstance(value["host"], str) else {}
    except (ValueError, KeyError, TypeError):
        return {}


def _named(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}" if holder else "another process"


def _is_dead(holder: dict[str, Any]) -> bool:
    return bool(holder) and holder["host"] == socket.gethostname() and not lives(holder["pid"])


def _is_same_file(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
