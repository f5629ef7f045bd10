"""Atomic file writes, checks of output paths, and the digest that the project uses."""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import msgspec

from cache_pipeline.errors import DISK_LIMITS, CachePipelineError, ConfigError

Location = Path | str
"""A folder or file as a path, or a URL as text, such as ``s3://bucket/lift.zarr``."""

DIGEST_BYTES = 16
URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):/+")
"""Start of a URL, also as ``Path`` spells it, with one slash."""
AT_FDCWD, RENAME_EXCHANGE = -100, 2
OLD_SECONDS = 60
PARTIAL = r"(\.[0-9a-f]{4})?\.\d+\.partial"
"""Regular expression of what :func:`atomic_path` puts after the name of a file."""


def is_url(place: str | os.PathLike[str]) -> bool:
    """Whether a place is written as a URL."""
    return isinstance(place, str) and URL.match(place) is not None


def location(place: str | os.PathLike[str]) -> Location:
    """Returns a URL unchanged, and anything else as a path; ``file://`` URLs are paths."""
    text = os.fspath(place)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return text if is_url(text) else Path(text)


def absolute(place: Location) -> str:
    """Returns a path without links, or a URL, as text that can be recorded."""
    return str(resolved(place)) if isinstance(place, Path) else place


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``: synced and renamed to ``path`` on success, removed on an error.

    An error for a full disk names ``path``, which Python's own error of a failed write does not.
    """
    path = Path(path)
    # Two machines or containers may write one file at the same time, with equal process numbers.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(2)}.{os.getpid()}.partial")
    try:
        yield partial
        sync_file(partial)
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno in DISK_LIMITS:
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def remove_partial(path: Path) -> None:
    """Removes temporary files that :func:`atomic_path` of a dead process has left beside ``path``."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        process = partial.name.split(".")[-2]
        with suppress(OSError):
            # The time protects a process of another machine that writes to the same file system.
            if process.isdecimal() and not lives(int(process)) and time.time() - partial.stat().st_mtime > OLD_SECONDS:
                remove(partial)


def lives(process: int) -> bool:
    """Whether a process of this machine has this number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


class FileKind(NamedTuple):
    """A kind of file that a command writes, recognised by content, not by name.

    Attributes:
        name: noun with its article, for messages.
        holds: returns whether an existing file is of this kind.
    """

    name: str
    holds: Callable[[Path], bool]


def begins_with(*starts: bytes, skip: int = 0) -> Callable[[Path], bool]:
    """Returns a test of a file's first bytes after ``skip`` bytes, ignoring case."""

    def holds(path: Path) -> bool:
        with path.open("rb") as file:
            head = file.read(skip + max(map(len, starts)))[skip:].lower()
        return any(head.startswith(start.lower()) for start in starts)

    return holds


PNG = FileKind("a PNG picture", begins_with(b"\x89PNG\r\n"))


def check_output(path: str | Path, kind: FileKind, *, overwrite: bool, sources: Iterable[str | Path] = ()) -> Path:
    """Checks that a command may write a file. Call it before any work.

    Args:
        path: the file; links are followed.
        kind: kind of the file to write.
        overwrite: whether to replace an existing file of this kind. Files of another kind are never replaced.
        sources: input files, which are never replaced.

    Returns:
        The real path of the file.

    Raises:
        ConfigError: the path is taken and may not be replaced.
    """
    real = resolved(path)
    if real.is_dir():
        raise ConfigError(f"{path} is a folder; give the path of a file")
    if not os.path.lexists(real):
        return real
    if not real.is_file():
        raise ConfigError(f"{path} is not a regular file; give the path of a regular file")
    if any(Path(source).exists() and real.samefile(source) for source in sources):
        raise ConfigError(f"{path} is an input of this command and is never replaced; choose another path")
    if real.stat().st_size and not _holds(kind, real):
        raise ConfigError(
            f"{path} exists and is not {kind.name}, so it is left alone even with --overwrite; choose another path"
        )
    if not overwrite:
        raise ConfigError(f"{path} exists already; replace it with --overwrite or choose another path")
    return real


@contextmanager
def output_file(
    path: str | Path, kind: FileKind, *, overwrite: bool, sources: Iterable[str | Path] = (), needed: int = 0
) -> Iterator[Path]:
    """Yields a temporary path for the file that a command writes; on success it becomes ``path``.

    Args:
        path, kind, overwrite, sources: as in :func:`check_output`.
        needed: smallest size of the file in bytes, if known.

    Raises:
        ConfigError: the path is taken and may not be replaced.
        CachePipelineError: the disk is full, or another limit for files is reached. An existing file is unchanged.
    """
    real = check_output(path, kind, overwrite=overwrite, sources=sources)
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        remove_partial(real)
        if shutil.disk_usage(real.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with atomic_path(real) as partial:
            yield partial
    except OSError as error:
        limit = DISK_LIMITS.get(error.errno or 0)
        if limit is None:
            raise
        raise CachePipelineError(
            f"{limit.reached} for {path}, which was not written; {limit.remedy} and run the same command again"
        ) from error


def resolved(path: str | Path) -> Path:
    """Returns the absolute path without links; raises ConfigError for a circular link."""
    try:
        found = Path(path).resolve()
        if any(part.is_symlink() for part in (found, *found.parents)):  # what Python 3.13 leaves of a circular link
            raise OSError(f"Symlink loop from {str(path)!r}")
        return found
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{path} cannot be resolved ({error}); choose another path") from error


def _holds(kind: FileKind, path: Path) -> bool:
    try:
        return kind.holds(path)
    except ValueError:
        return False


def write_json(path: str | Path, value: Any) -> None:
    """Writes ``value`` as JSON, atomically; errors as in :func:`json_bytes`."""
    data = json_bytes(value)
    with atomic_path(path) as partial:
        partial.write_bytes(data)


def json_bytes(value: Any) -> bytes:
    """Returns ``value`` as JSON in UTF-8. Raises ValueError for NaN and infinity, which JSON does not have."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    if not text.isascii() and any(0xD800 <= ord(sign) <= 0xDFFF for sign in text):  # of a path that is not UTF-8
        text = json.dumps(value, indent=1, allow_nan=False)
    return f"{text}\n".encode()


def read_json(path: str | Path) -> Any:
    """Reads one JSON value; raises ``OSError`` or ``ValueError``, the latter also for NaN and infinity."""
    return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_not_json)


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def check_numbers(value: Any) -> None:
    """Raises ValueError for a number in a JSON value that is infinite, such as 1e999, or has more than 64 bits."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict | list):
            stack += item.values() if isinstance(item, dict) else item
        elif (isinstance(item, int) and abs(item) >= 2**64) or (isinstance(item, float) and not math.isfinite(item)):
            raise ValueError(f"it holds the number {item}")


def typed(value: Any, kind: Any) -> Any:
    """Converts a JSON value to a type, such as ``dict[str, int]``, a dataclass or a named tuple; raises ValueError."""
    try:
        return msgspec.convert(value, kind)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def finite(value: Any) -> Any:
    """Returns a JSON value in which NaN and infinity, which JSON does not have, are None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def digest(*parts: bytes | bytearray | memoryview) -> str:
    """Returns the 128-bit blake2b of the concatenated parts, in hex."""
    hasher = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()


def json_digest(value: Any) -> str:
    """Returns the digest of a JSON value, independent of key order."""
    return digest(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())


def exchange(one: Path, other: Path) -> bool:
    """Swaps two paths of one file system atomically; returns False, without a change, if unsupported."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and not rename(
        AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), ctypes.c_uint(RENAME_EXCHANGE)
    )


def remove(path: Path) -> None:
    """Removes a file, link or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def free_path(path: Path) -> Path:
    """Returns ``path`` if it is free, else the first free ``path_2``, ``path_3``, …"""
    tried = chain([path], (path.with_name(f"{path.name}_{number}") for number in count(2)))
    return next(path for path in tried if not os.path.lexists(path))


def numbered(path: Path) -> Iterator[Path]:
    """Yields ``name.json``, ``name_2.json``, ``name_3.json``, …"""
    yield path
    yield from (path.with_name(f"{path.stem}_{number}{path.suffix}") for number in count(2))


def sync_folder(path: str | Path) -> None:
    """Syncs a folder's list of names to the disk."""
    _sync(path, os.O_RDONLY)


def sync_file(path: str | Path) -> None:
    """Syncs the contents of a file to the disk."""
    _sync(path, os.O_RDWR)


def _sync(path: str | Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
