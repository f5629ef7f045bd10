"""The folder of a cache: what may be made, replaced or removed there."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from cache_pipeline.cache.manifest import MANIFEST, PENDING, is_cache
from cache_pipeline.errors import CacheError, NotACacheError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def beside(path: Path, purpose: str) -> Path:
    """A folder next to the cache: ``new`` while it is being made anew, ``old`` while it is being swapped out."""
    return path.with_name(f"{path.name}.{purpose}")


def check_target(path: Path) -> None:
    """Refuses a path that holds something else than a cache.

    Raises:
        NotACacheError: it is a file, or a folder with other contents; nothing there is touched.
    """
    if path.is_file():
        raise NotACacheError(f"{path} is a file, a cache is a folder; choose another --out")
    if path.is_dir() and not is_cache(path) and any(not _is_partial(item) for item in path.iterdir()):
        raise NotACacheError(f"{path} is a folder with other contents, which is left alone; choose another --out")


def finish_swap(path: Path) -> None:
    """Ends a swap that was cut off: the new cache is put into place, or the old one is cleared away."""
    old, new = beside(path, "old"), beside(path, "new")
    if not is_cache(old):
        return
    if not path.exists():
        os.rename(new if (new / MANIFEST).is_file() else old, path)
    remove_cache(old)


def swap(new: Path, path: Path) -> None:
    """Puts the complete cache ``new`` in the place of ``path``; a kill in between is mended by :func:`finish_swap`."""
    assert (new / MANIFEST).is_file(), new
    old = beside(path, "old")
    if path.exists():
        os.rename(path, old)
    os.rename(new, path)
    remove_cache(old)


def remove_cache(path: Path) -> None:
    """Removes a cache, and nothing that is not one. A kill on the way leaves an unfinished cache."""
    if not is_cache(path):
        return
    if (path / MANIFEST).is_file():
        os.replace(path / MANIFEST, path / PENDING)
    for item in path.iterdir():
        if item.name != PENDING:
            shutil.rmtree(item) if item.is_dir() else item.unlink()
    (path / PENDING).unlink()
    path.rmdir()


def remove_partial_files(path: Path) -> None:
    """Clears away what a killed writer left half-written."""
    for file in path.rglob("*.partial"):
        file.unlink(missing_ok=True)


def remove_other_files(folder: Path, kept: Collection[str]) -> None:
    """Clears away the files of a folder whose names are not ``kept``."""
    for file in folder.iterdir():
        if file.name not in kept:
            file.unlink()


@contextmanager
def told_when_full(path: Path, needed: int) -> Iterator[None]:
    """Turns a full disk into one line that says how much is needed.

    Args:
        path: where is being written.
        needed: bytes that the whole work writes at most.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise CacheError(
            f"no space left for {path}: {needed / 1e6:.1f} MB were to be written in all; "
            "free some and run the same command again, it goes on where it stopped"
        ) from error


def folder_bytes(path: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _is_partial(item: Path) -> bool:
    return item.name.startswith(".") and item.name.endswith(".partial")
