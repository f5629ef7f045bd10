"""The folder of a cache: what may be made, replaced or removed there. Contents decide what is ours, never names."""

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
from cache_pipeline.errors import CacheError, NotACacheError
from cache_pipeline.files import NO_SPACE, json_digest, read_json, sync_folder, write_json

Role = Literal["new", "compact", "old"]
"""What a folder beside the cache is: the cache being made anew, being compacted, or what was swapped out."""

MARKER = ".cache_pipeline.json"
"""Lies in each folder beside a cache and says, with its own digest, which folder it is in, of which cache, and why."""

CONTENTS = ("zarr.json", "encoder", "features", "frame_digests", "low_dim", "actions", "rewards", "dones", "ledger")
"""What a cache consists of, besides its manifests, in the order in which it is removed."""

PARTIAL = re.compile(r"\..+\.\d+\.partial")
WEIGHTS = re.compile(r"[0-9a-f]{32}\.safetensors")


def unused_name(path: Path, role: Role) -> Path:
    """A hidden path next to the cache at which nothing is."""
    while True:
        folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}.{role}")
        if not os.path.lexists(folder):
            return folder


def make_beside(folder: Path, path: Path, role: Role) -> None:
    """Makes ``folder``, beside the cache at ``path``, and marks it as ours."""
    folder.mkdir(parents=True, exist_ok=True)
    if not _is_marked(folder, path, role):
        _mark(folder, folder.name, path, role)


def folders_beside(path: Path, role: Role) -> list[Path]:
    """The folders beside a cache that runs of ours left there."""
    if not path.parent.is_dir():
        return []
    names = [entry.name for entry in os.scandir(path.parent) if entry.name.startswith(f".{path.name}.")]
    folders = [path.with_name(name) for name in sorted(names)]
    return [folder for folder in folders if not folder.is_symlink() and _is_marked(folder, path, role)]


def check_target(path: Path) -> None:
    """Refuses a path that holds something else than a cache, or that lies inside one.

    Raises:
        NotACacheError: it is a file, or a folder with other contents; nothing there is touched.
    """
    if os.path.lexists(path) and not path.is_dir():
        raise NotACacheError(f"{path} is a file, a cache is a folder; choose another --out")
    if path.is_dir() and not is_cache(path) and any(not _is_partial(item) for item in path.iterdir()):
        raise NotACacheError(f"{path} is a folder with other contents, which is left alone; choose another --out")
    around = next((folder for folder in path.parents if is_cache(folder)), None)
    if around is not None:
        raise NotACacheError(f"{path} lies inside the cache {around}; choose another --out")


def finish_swap(path: Path) -> None:
    """Ends a swap that was cut off: the new cache is put into place, or the old one is cleared away."""
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
    """Puts the complete cache ``new`` in the place of ``path``; a kill in between is mended by :func:`finish_swap`."""
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
    """Removes what a cache consists of; other files in its folder stay. A kill on the way leaves an unfinished cache
    or a marked folder, which the next run removes.
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
    """Clears away what a killed writer left half-written."""
    for file in path.rglob(".*.partial"):
        if _is_partial(file):
            file.unlink(missing_ok=True)


def remove_other_weights(path: Path, kept: Iterable[str]) -> None:
    """Clears away the weights in a cache that are not among ``kept``, paths inside it."""
    names = {Path(file).name for file in kept}
    for file in (path / "encoder").iterdir():
        if WEIGHTS.fullmatch(file.name) and file.name not in names:
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


def _clear_away(old: Path, path: Path) -> None:
    """Removes a cache that was swapped out; what others put into its folder goes into that of the new one."""
    known = {MANIFEST, PENDING, MARKER, *CONTENTS}
    for item in list(old.iterdir()):
        if item.name not in known and not _is_partial(item) and not os.path.lexists(path / item.name):
            os.rename(item, path / item.name)
    remove_cache(old)


def _mark(folder: Path, name: str, path: Path, role: Role) -> None:
    """Marks a folder that is, or is about to be, called ``name``."""
    value = {"format": 1, "role": role, "cache": path.name, "folder": name}
    write_json(folder / MARKER, {**value, "digest": json_digest(value)})


def _read_marker(folder: Path) -> dict[str, str] | None:
    """What the marker in a folder says; None when there is none of ours."""
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
