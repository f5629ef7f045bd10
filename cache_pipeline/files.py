"""Files that are either whole or absent, and the one digest that the project uses."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

DIGEST_BYTES = 16
AT_FDCWD, RENAME_EXCHANGE = -100, 2


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
