"""Files that are either whole or absent, and the one digest that the project uses."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

from cache_pipeline.errors import CachePipelineError, ConfigError

DIGEST_BYTES = 16
AT_FDCWD, RENAME_EXCHANGE = -100, 2
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
FULL_BYTES = 1 << 16  # a disk with less free space counts as full


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on success it is synced and renamed into place, on an error removed."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        _sync(partial, os.O_RDWR)
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


class FileKind(NamedTuple):
    """A kind of file that a command writes, known by its contents and never by its name.

    Attributes:
        name: for messages, with its article.
        holds: whether an existing file is of this kind.
    """

    name: str
    holds: Callable[[Path], bool]


def begins_with(*starts: bytes, skip: int = 0) -> Callable[[Path], bool]:
    """A test of a file's first bytes after ``skip`` bytes, upper and lower case alike."""

    def holds(path: Path) -> bool:
        with path.open("rb") as file:
            head = file.read(skip + max(map(len, starts)))[skip:].lower()
        return any(head.startswith(start.lower()) for start in starts)

    return holds


PNG = FileKind("a PNG picture", begins_with(b"\x89PNG\r\n"))


def check_output(path: str | Path, kind: FileKind, *, overwrite: bool, sources: Iterable[str | Path] = ()) -> Path:
    """Refuses, before any work, a file that a command must not write.

    Args:
        path: the file; a link stands for what it points to.
        kind: what is to be written.
        overwrite: whether an existing file of that kind may be replaced. One of another kind never is.
        sources: files that the command reads, or that others need.

    Returns:
        The file's real path.

    Raises:
        ConfigError: something is there that is not replaced; it is left as it was.
    """
    real = resolved(path)
    if real.is_dir():
        raise ConfigError(f"{path} is a folder; give the path of a file")
    if not os.path.lexists(real):
        return real
    if not real.is_file():
        raise ConfigError(f"{path} is no ordinary file; give the path of one")
    if any(Path(source).exists() and real.samefile(source) for source in sources):
        raise ConfigError(f"{path} is a source of this command, which is never replaced; choose another path")
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
    """Yields a temporary path for the one file that a command writes; on success it becomes ``path``.

    Args:
        path, kind, overwrite, sources: as those of :func:`check_output`.
        needed: bytes that the file takes at least, where that is known.

    Raises:
        ConfigError: something is there that is not replaced.
        CachePipelineError: the disk is full; an existing file is left as it was.
    """
    real = check_output(path, kind, overwrite=overwrite, sources=sources)
    real.parent.mkdir(parents=True, exist_ok=True)
    try:
        if shutil.disk_usage(real.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with atomic_path(real) as partial, _full_disk_told(real.parent):
            yield partial
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise CachePipelineError(
            f"no space left for {path}, which was not written; free some and run the same command again"
        ) from error


def resolved(path: str | Path) -> Path:
    """The absolute path without links; ConfigError for a link to itself."""
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{path} cannot be resolved ({error}); choose another path") from error


@contextmanager
def _full_disk_told(folder: Path) -> Iterator[None]:
    """Some libraries raise ``RuntimeError`` for a write that failed: on a full disk it becomes an ``OSError``."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, CachePipelineError) or shutil.disk_usage(folder).free > FULL_BYTES:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error


def _holds(kind: FileKind, path: Path) -> bool:
    try:
        return kind.holds(path)
    except ValueError:
        return False


def write_json(path: str | Path, value: Any) -> None:
    """Writes ``value`` as JSON, atomically. NaN and infinities are refused: they are not JSON."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Reads one JSON value; raises ``OSError`` or ``ValueError``."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def digest(*parts: bytes | bytearray | memoryview) -> str:
    """The 128-bit blake2b of the parts' concatenation, in hex."""
    hasher = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()


def json_digest(value: Any) -> str:
    """The digest of a JSON value, independent of key order."""
    return digest(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())


def exchange(one: Path, other: Path) -> bool:
    """Lets two paths of one file system change places in one step; False, and nothing done, where that cannot be."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and not rename(
        AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), ctypes.c_uint(RENAME_EXCHANGE)
    )


def remove(path: Path) -> None:
    """Removes a file, a link or a folder; nothing if it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def free_path(path: Path) -> Path:
    """``path``, or with a number after its name if something is there."""
    tried = chain([path], (path.with_name(f"{path.name}_{number}") for number in count(2)))
    return next(path for path in tried if not os.path.lexists(path))


def sync_folder(path: Path) -> None:
    """Brings to the disk which names the folder holds."""
    _sync(path, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
