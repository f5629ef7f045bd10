"""Where the objects of a cache lie: in a folder, or under a URL of an object store, such as ``s3://bucket/lift.zarr``.

Everything in this package reads and writes through a :class:`Store`. Names are paths inside the cache, such as
``features/agentview_image/c/0/12/0``. An object is written whole: a reader sees the old one or the new one.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cache_pipeline.cache.store_protocol import Buffer, OpenObject, Stamp, Store
from cache_pipeline.files import atomic_path, is_url, location, resolved

NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)

Place = Store | Path | str


def store_at(place: Place) -> Store:
    """Returns the store of a folder or URL, or a store unchanged.

    Raises:
        MissingExtraError: a URL without the package that reads it.
        ConfigError: a URL of a kind that is not supported.
    """
    if not isinstance(place, str | os.PathLike):
        return place
    where = location(place)
    if isinstance(where, Path):
        return FolderStore(where)
    from cache_pipeline.cache.object_store import ObjectStore

    return ObjectStore(where)


def real_store(place: Place) -> Store:
    """Returns the store of a place that is to be written: a folder at its absolute path, without links."""
    store = store_at(place)
    return FolderStore(resolved(store.place)) if isinstance(store.place, Path) else store


def is_remote(place: Place) -> bool:
    """Whether the place is a URL rather than a folder."""
    return is_url(place if isinstance(place, str | os.PathLike) else place.place)


def exists(store: Store, name: str) -> bool:
    """Whether an object exists."""
    return store.stamp(name) is not None


def stored_bytes(store: Store) -> int:
    """Returns the total size of all objects in bytes."""
    return sum(size for _, size in store.sizes())


class FolderStore:
    """A folder of a local or mounted file system. Its files are synced to the disk when they are written."""

    def __init__(self, path: Path) -> None:
        self.place = path

    def read(self, name: str) -> bytes:
        return (self.place / name).read_bytes()

    @contextmanager
    def open(self, name: str) -> Iterator[OpenObject]:
        descriptor = os.open(self.place / name, os.O_RDONLY)
        try:
            yield _OpenFile(descriptor)
        finally:
            os.close(descriptor)

    def stamp(self, name: str) -> Stamp | None:
        try:
            status = os.stat(self.place / name)
        except OSError as error:
            if error.errno in NOT_THERE:
                return None
            raise
        return (status.st_ino, status.st_mtime_ns, status.st_size) if stat.S_ISREG(status.st_mode) else None

    def write(self, name: str, *parts: bytes | Buffer) -> None:
        file = self.place / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as partial, partial.open("wb") as opened:
            for part in parts:
                opened.write(part)

    def write_after(self, name: str, stamp: Stamp | None, *parts: bytes | Buffer) -> Stamp | None:
        """Writes an object. The lock of the folder keeps other writers out, so nothing is compared."""
        self.write(name, *parts)
        return self.stamp(name)

    def delete(self, name: str) -> None:
        (self.place / name).unlink(missing_ok=True)

    def sizes(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        for folder, _, files in os.walk(self.place / prefix):
            inside = os.path.relpath(folder, self.place)
            for file in files:
                name = file if inside == "." else f"{inside}/{file}"
                yield name, os.lstat(self.place / name).st_size

    def sibling(self, name: str) -> FolderStore:
        return FolderStore(self.place.with_name(name))

    def siblings(self, prefix: str) -> list[str]:
        if not self.place.parent.is_dir():
            return []
        with os.scandir(self.place.parent) as entries:
            return sorted(e.name for e in entries if e.name.startswith(prefix) and e.is_dir(follow_symlinks=False))

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def parents(self) -> Iterator[Store]:
        return map(FolderStore, self.place.parents)

    def zarr(self, name: str, *, read_only: bool) -> tuple[Any, str]:
        from zarr.storage import LocalStore

        return LocalStore(self.place, read_only=read_only), name

    def __repr__(self) -> str:
        return f"FolderStore({str(self.place)!r})"


class _OpenFile:
    """A file descriptor, read without copies."""

    at_once = 1 << 20

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def tail(self, count: int) -> tuple[bytes, int]:
        size = os.fstat(self._descriptor).st_size
        return os.pread(self._descriptor, count, max(0, size - count)), size

    def read_runs(self, runs: Sequence[tuple[int, Sequence[Buffer]]]) -> Iterator[int]:
        for offset, buffers in runs:
            yield os.preadv(self._descriptor, buffers, offset)
