"""Creates, replaces and removes cache folders. Recognises a folder as a cache by its contents, never by its name."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from cache_pipeline.cache.manifest import MANIFEST, PENDING, is_cache, is_complete
from cache_pipeline.errors import DISK_LIMITS, CacheError, NotACacheError
from cache_pipeline.files import json_digest, read_json, sync_folder, write_json

Role = Literal["new", "compact", "old"]
"""Role of a folder beside the cache: a new cache being written, one being compacted, or an old one swapped out."""

MARKER = ".cache_pipeline.json"
"""File in each folder beside a cache. It records the folder, the cache, the role and its own digest."""

CONTENTS = ("zarr.json", "encoder", "features", "frame_digests", "low_dim", "actions", "rewards", "dones", "ledger")
"""Contents of a cache besides its manifests, in the order in which they are removed."""

PARTIAL = re.compile(r"\..+\.\d+\.partial")
WEIGHTS = re.compile(r"[0-9a-f]{32}\.safetensors")


def unused_name(path: Path, role: Role) -> Path:
    """Returns an unused hidden path beside the cache."""
    while True:
        folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}.{role}")
        if not os.path.lexists(folder):
            return folder


def make_beside(folder: Path, path: Path, role: Role) -> None:
    """Creates ``folder`` beside the cache at ``path`` and writes the marker file into it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not _is_marked(folder, path, role):
        _mark(folder, folder.name, path, role)


def folders_beside(path: Path, role: Role) -> list[Path]:
    """Returns the marked folders of this role that earlier commands left beside a cache."""
    if not path.parent.is_dir():
        return []
    names = [entry.name for entry in os.scandir(path.parent) if entry.name.startswith(f".{path.name}.")]
    folders = [path.with_name(name) for name in sorted(names)]
    return [folder for folder in folders if not folder.is_symlink() and _is_marked(folder, path, role)]


def check_target(path: Path) -> None:
    """Raises NotACacheError if a path holds anything but a cache, or lies inside one.

    Raises:
        NotACacheError: the path is a file, a folder with other contents, or inside a cache. Nothing is changed.
    """
    if os.path.lexists(path) and not path.is_dir():
        raise NotACacheError(f"{path} is a file, but a cache is a folder; choose another --out")
    if path.is_dir() and not is_cache(path) and any(not _is_partial(item) for item in path.iterdir()):
        raise NotACacheError(f"{path} is a folder with other contents, which are not replaced; choose another --out")
    around = next((folder for folder in path.parents if is_cache(folder)), None)
    if around is not None:
        raise NotACacheError(f"{path} lies inside the cache {around}; choose another --out")


def finish_swap(path: Path) -> None:
    """Finishes an interrupted swap: moves the new cache into place, or removes the old one."""
    for folder in folders_beside(path, "compact"):
        remove_cache(folder)
    new = [folder for folder in folders_beside(path, "new") if is_complete(folder)]
    old = folders_beside(path, "old")
    if old and not os.path.lexists(path):
        os.rename(new[0] if new else old.pop(), path)
    elif new and _read_marker(path) is not None:
        swap(new[0], path)
    if _read_marker(path) is not None:
        (path / MARKER).unlink()
    if old and is_complete(path):
        for folder in old:
            _clear_away(folder, path)


def swap(new: Path, path: Path) -> None:
    """Replaces ``path`` by the complete cache ``new``; :func:`finish_swap` completes an interrupted swap."""
    assert (new / MANIFEST).is_file(), new
    old = None
    if path.exists():
        old = unused_name(path, "old")
        _mark(path, old.name, path, "old")
        os.rename(path, old)
    os.rename(new, path)
    sync_folder(path.parent)
    (path / MARKER).unlink()
    if old is not None:
        _clear_away(old, path)


def remove_cache(path: Path) -> None:
    """Removes the contents of a cache; other files in its folder stay. A kill leaves an unfinished cache or a marked
    folder, which the next run removes.
    """
    if not (is_cache(path) or _read_marker(path) is not None):
        return
    if is_complete(path):
        os.replace(path / MANIFEST, path / PENDING)
    for name in (MANIFEST, *CONTENTS):
        item = path / name
        shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink(missing_ok=True)
    for item in list(path.iterdir()):
        if _is_partial(item):
            item.unlink()
    for name in (PENDING, MARKER):
        (path / name).unlink(missing_ok=True)
    if not any(path.iterdir()):
        path.rmdir()


def remove_partial_files(path: Path) -> None:
    """Removes partial files of a killed writer."""
    for file in path.rglob(".*.partial"):
        if _is_partial(file):
            file.unlink(missing_ok=True)


def remove_other_weights(path: Path, kept: Iterable[str]) -> None:
    """Removes the weights in a cache that are not among ``kept``, which are paths inside it."""
    names = {Path(file).name for file in kept}
    for file in (path / "encoder").iterdir():
        if WEIGHTS.fullmatch(file.name) and file.name not in names:
            file.unlink()


@contextmanager
def told_when_full(path: Path, needed: int) -> Iterator[None]:
    """Turns a full-disk error into a CacheError that says how many bytes are needed.

    Args:
        path: the folder that is written.
        needed: upper bound of the bytes to write.
    """
    try:
        yield
    except OSError as error:
        limit = DISK_LIMITS.get(error.errno or 0)
        if limit is None:
            raise
        raise CacheError(
            f"{limit.reached} for {path}: it needs {needed / 1e6:.1f} MB in total; "
            f"{limit.remedy} and run the same command again, which continues where it stopped"
        ) from error


def folder_bytes(path: Path) -> int:
    """Returns the total size of all files in a folder in bytes."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _clear_away(old: Path, path: Path) -> None:
    """Removes a cache that was swapped out; moves other files in its folder to the folder of the new cache."""
    known = {MANIFEST, PENDING, MARKER, *CONTENTS}
    for item in list(old.iterdir()):
        if item.name not in known and not _is_partial(item) and not os.path.lexists(path / item.name):
            os.rename(item, path / item.name)
    remove_cache(old)


def _mark(folder: Path, name: str, path: Path, role: Role) -> None:
    """Writes the marker file of a folder that is named ``name`` or will be."""
    value = {"format": 1, "role": role, "cache": path.name, "folder": name}
    write_json(folder / MARKER, {**value, "digest": json_digest(value)})


def _read_marker(folder: Path) -> dict[str, str] | None:
    """Reads the marker file of a folder; returns None if it has no valid one."""
    try:
        value = read_json(folder / MARKER)
        claimed = value.pop("digest")
        return value if claimed == json_digest(value) else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def _is_marked(folder: Path, path: Path, role: Role) -> bool:
    marker = _read_marker(folder) or {}
    return [marker.get(key) for key in ("role", "cache", "folder")] == [role, path.name, folder.name]


def _is_partial(item: Path) -> bool:
    return PARTIAL.fullmatch(item.name) is not None and item.is_file()
