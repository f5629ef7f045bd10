"""Opens HDF5 files, and converts what goes wrong to errors of this project."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
from isal import igzip_lib

from cache_pipeline.errors import LIMITS, DatasetError
from cache_pipeline.isolation import isolated
from cache_pipeline.text import listed

# Exceptions of h5py for damaged objects, broken links and types that NumPy lacks.
READ_ERRORS = (OSError, KeyError, RuntimeError, ValueError, TypeError)


def check_exists(path: Path) -> None:
    """Raises DatasetError if there is no file at a path; names the HDF5 files beside it."""
    if not path.exists():
        near = sorted(other.name for other in path.parent.glob("*.hdf5")) if path.parent.is_dir() else []
        beside = f"; the folder holds {listed(near)}" if near else "; check the path"
        raise DatasetError(f"there is no file {path}{beside}")
    if path.is_dir():
        raise DatasetError(f"{path} is a folder; name a robomimic HDF5 file")


def open_file(path: Path) -> h5py.File:
    """Opens a file for reading.

    Raises:
        DatasetError: the file is missing, unreadable, not HDF5, truncated, or being written by another process.
    """
    try:
        check_exists(path)
        return h5py.File(path, "r")
    except PermissionError as error:
        raise DatasetError(f"no permission to read {path}; change its permissions") from error
    except BlockingIOError as error:
        raise DatasetError(f"{path} is being written by another process; wait until it is closed") from error
    except OSError as error:
        if error.errno in LIMITS:
            raise
        raise DatasetError(f"{path} {_why_not_opened(path, ' '.join(str(error).split()))}") from error


def _why_not_opened(path: Path, reason: str) -> str:
    if "truncated" in reason:
        expected = re.search(r"stored_eof = (\d+)", reason)
        size = f"{path.stat().st_size} bytes" + (f" of {expected[1]}" if expected else "")
        return f"is cut off ({size}): copy or download it again"
    if "unable to lock" in reason:
        return f"cannot be locked for reading on this file system ({reason}); set HDF5_USE_FILE_LOCKING=FALSE"
    if not h5py.is_hdf5(path):
        return "is not an HDF5 file; name a robomimic .hdf5 file"
    return f"cannot be opened, its HDF5 header is damaged ({reason}); copy or download it again"


@contextmanager
def damage_as_error(path: Path, what: str = "its structure") -> Iterator[None]:
    """Converts errors of h5py and ISA-L for damaged bytes to ``DatasetError``; limits of the system stay OSError."""
    try:
        yield
    except DatasetError:
        raise
    except (*READ_ERRORS, igzip_lib.IsalError) as error:  # type: ignore[misc]
        if isinstance(error, OSError) and error.errno in LIMITS:
            raise
        reason = " ".join(str(error).split())
        raise DatasetError(f"{path} is damaged: {what} cannot be read ({reason}); copy or download it again") from error


class WrittenFile(io.FileIO):
    """A file for h5py to write to. It keeps the first error of the system from HDF5, which could not close the file.

    Attributes:
        error: that error. What HDF5 writes after it is dropped.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest and self.error is None:
            try:
                rest = rest[super().write(rest) :]
            except OSError as error:
                self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0

    def check(self) -> None:
        """Raises the kept error, if any."""
        if self.error is not None:
            raise self.error


@contextmanager
def new_hdf5(path: Path) -> Iterator[tuple[h5py.File, Callable[[], None]]]:
    """Yields a new HDF5 file, and a function that raises OSError if a write has failed: call it after each demo.

    On a full disk HDF5 cannot close a file that it writes by itself: it prints an error for each object in it.
    """
    with WrittenFile(str(path), "w+") as target:
        try:
            with h5py.File(target, "w") as file:
                yield file, target.check
        finally:
            target.check()


def holds_hdf5(path: Path) -> bool:
    """Whether a file starts with the HDF5 signature. Does not call HDF5."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(8) == b"\x89HDF\r\n\x1a\n"


def group_attributes(path: Path, name: str = "data") -> dict[str, Any] | None:
    """Reads the attributes of a group of an HDF5 file, in the child process; None if there is no such group."""
    with damage_as_error(path):
        return isolated(_group_attributes, path, name)


def _group_attributes(path: Path, name: str) -> dict[str, Any] | None:
    with h5py.File(path, "r") as file:
        return dict(file[name].attrs) if name in file else None
