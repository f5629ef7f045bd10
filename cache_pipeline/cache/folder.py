"""Creates, replaces and removes whole caches. Recognises a cache by its contents, never by its name.

A folder is replaced by renaming. An object store cannot rename: there the new cache is copied over the old one, inside
the object store, after a claim in the manifest has told readers and other writers; the next run finishes such a copy.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from cache_pipeline.cache.manifest_store import (
    MANIFEST,
    PENDING,
    claim_manifest,
    is_cache,
    is_complete,
    read_manifest,
    replaced_by,
    write_manifest,
)
from cache_pipeline.cache.object_store import ObjectStore
from cache_pipeline.cache.store import FolderStore
from cache_pipeline.cache.store_protocol import Stamp, Store
from cache_pipeline.errors import DISK_LIMITS, CacheError, NotACacheError
from cache_pipeline.files import Location, json_bytes, json_digest, sync_folder

Role = Literal["new", "compact", "old"]
"""Role of a folder beside the cache: a new cache being written, one being compacted, or an old one swapped out."""

MARKER = ".cache_pipeline.json"
"""File in each folder beside a cache. It records the folder, the cache, the role and its own digest."""

CONTENTS = (
    "zarr.json",
    "encoder",
    "tables",
    "features",
    "frame_digests",
    "low_dim",
    "actions",
    "rewards",
    "dones",
    "ledger",
)
"""Contents of a cache besides its manifests, in the order in which they are removed."""

PARTIAL = re.compile(r"\..+\.\d+\.partial")
WEIGHTS = re.compile(r"[0-9a-f]{32}\.safetensors")
COPIES = 16
"""Objects that are copied or removed at the same time."""


def unused_sibling(store: Store, role: Role) -> Store:
    """Returns a store with an unused hidden name beside the cache."""
    while True:
        name = f".{store.name}.{secrets.token_hex(4)}.{role}"
        if not store.siblings(name):
            return store.sibling(name)


def make_beside(new: Store, store: Store, role: Role) -> None:
    """Begins a cache beside ``store`` with its marker file."""
    if not _is_marked(new, store, role):
        _mark(new, new.name, store, role)


def stores_beside(store: Store, role: Role) -> list[Store]:
    """Returns the marked caches of this role that earlier commands left beside a cache."""
    found = [store.sibling(name) for name in store.siblings(f".{store.name}.")]
    return [other for other in found if _is_marked(other, store, role)]


def check_target(store: Store) -> None:
    """Raises NotACacheError if a place holds anything but a cache, or lies inside one. Nothing is changed."""
    place = store.place
    if isinstance(place, Path) and os.path.lexists(place) and not place.is_dir():
        raise NotACacheError(f"{place} is a file, but a cache is a folder; choose another --out")
    if any(not PARTIAL.fullmatch(name) for name, _ in _first(store)) and not is_cache(store):
        raise NotACacheError(f"{place} is a folder with other contents, which are not replaced; choose another --out")
    around = next((folder for folder in store.parents if is_cache(folder)), None)
    if around is not None:
        raise NotACacheError(f"{place} lies inside the cache {around.place}; choose another --out")


def finish_swap(store: Store) -> None:
    """Finishes an interrupted swap: moves the new cache into place, or removes the old one."""
    if isinstance(store, ObjectStore):
        name = replaced_by(store)
        if name is not None and is_complete(beside := store.sibling(name)):
            _copy_over(beside, store, store.stamp(MANIFEST))
        return
    assert isinstance(store, FolderStore), store
    for leftover in stores_beside(store, "compact"):
        remove_cache(leftover)
    path = store.place
    new = [folder for folder in _folders_beside(store, "new") if is_complete(folder)]
    old = _folders_beside(store, "old")
    if old and not os.path.lexists(path):
        os.rename(new[0] if new else old.pop(), path)
    elif new and _read_marker(store) is not None:
        swap(FolderStore(new[0]), store)
    if _read_marker(store) is not None:
        (path / MARKER).unlink()
    if old and is_complete(store):
        for folder in old:
            _clear_away(folder, path)


def swap(new: Store, store: Store, after: Stamp | None = None) -> None:
    """Replaces a cache by the complete cache ``new``; :func:`finish_swap` completes an interrupted swap.

    Args:
        after: on an object store, the stamp that the manifest of ``store`` must still have.

    Raises:
        ChangedError: another process has written the cache.
    """
    if isinstance(store, ObjectStore):
        assert isinstance(new, ObjectStore), new
        _copy_over(new, store, claim_manifest(store, after, {"replaced_by": new.name}))
        return
    assert isinstance(store, FolderStore), store
    assert isinstance(new, FolderStore), new
    path, old = store.place, None
    assert (new.place / MANIFEST).is_file(), new
    if path.exists():
        old = Path(unused_sibling(store, "old").place)
        _mark(store, old.name, store, "old")
        os.rename(path, old)
    os.rename(new.place, path)
    sync_folder(path.parent)
    (path / MARKER).unlink()
    if old is not None:
        _clear_away(old, path)


def _copy_over(new: ObjectStore, store: ObjectStore, claim: Stamp | None) -> None:
    """Copies the complete cache ``new`` over ``store``, whose manifest has the stamp ``claim``."""
    manifest = read_manifest(new)
    names = [name for name, _ in new.sizes() if name not in (MANIFEST, PENDING, MARKER)]
    kept = set(names)
    gone = [name for name, _ in store.sizes() if name.split("/")[0] in CONTENTS and name not in kept]
    with ThreadPoolExecutor(COPIES) as pool:
        list(pool.map(lambda name: store.copy_from(new, name), names))
        list(pool.map(store.delete, gone))
    write_manifest(store, manifest, claim)
    roles: tuple[Role, ...] = ("new", "compact")
    for other in (other for role in roles for other in stores_beside(store, role)):
        remove_cache(other)


def remove_cache(store: Store) -> None:
    """Removes the contents of a cache; other files in its folder stay. A kill leaves an unfinished cache or a marked
    folder, which the next run removes.
    """
    if not (is_cache(store) or _read_marker(store) is not None):
        return
    if isinstance(store, ObjectStore):
        names = [name for name, _ in store.sizes()]
        with ThreadPoolExecutor(COPIES) as pool:
            list(pool.map(store.delete, [name for name in names if name.split("/")[0] in (*CONTENTS, MANIFEST)]))
        for name in (PENDING, MARKER):
            store.delete(name)
        return
    assert isinstance(store, FolderStore), store
    path = store.place
    if is_complete(store):
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


def remove_partial_files(store: Store) -> None:
    """Removes partial files of a killed writer; an object store has none."""
    for name, _ in store.sizes() if isinstance(store, FolderStore) else ():
        if PARTIAL.fullmatch(name.rpartition("/")[2]):
            store.delete(name)


def remove_other_weights(store: Store, kept: Iterable[str]) -> None:
    """Removes the weights in a cache that are not among ``kept``, which are names inside it."""
    names = set(kept)
    for name, _ in list(store.sizes("encoder/")):
        if WEIGHTS.fullmatch(name.removeprefix("encoder/")) and name not in names:
            store.delete(name)


@contextmanager
def told_when_full(place: Location, needed: int, kept: str) -> Iterator[None]:
    """Turns a full-disk error into a CacheError that says how many bytes are needed.

    Args:
        place: the cache that is written.
        needed: upper bound of the bytes to write.
        kept: the end of the message, which says what has been kept.
    """
    try:
        yield
    except OSError as error:
        limit = DISK_LIMITS.get(error.errno or 0)
        if limit is None:
            raise
        raise CacheError(
            f"{limit.reached} for {place}: it needs {needed / 1e6:.1f} MB in total; "
            f"{limit.remedy} and run the same command again{kept}"
        ) from error


def _first(store: Store) -> list[tuple[str, int]]:
    """Returns the first objects of a place: enough to see whether it holds anything but partial files."""
    found = []
    for item in store.sizes():
        found.append(item)
        if not PARTIAL.fullmatch(item[0]):
            break
    return found


def _clear_away(old: Path, path: Path) -> None:
    """Removes a cache that was swapped out; moves other files in its folder to the folder of the new cache."""
    known = {MANIFEST, PENDING, MARKER, *CONTENTS}
    for item in list(old.iterdir()):
        if item.name not in known and not _is_partial(item) and not os.path.lexists(path / item.name):
            os.rename(item, path / item.name)
    remove_cache(FolderStore(old))


def _folders_beside(store: FolderStore, role: Role) -> list[Path]:
    return [Path(other.place) for other in stores_beside(store, role)]


def _mark(folder: Store, name: str, store: Store, role: Role) -> None:
    """Writes the marker file of a folder that is named ``name`` or will be."""
    value = {"format": 1, "role": role, "cache": store.name, "folder": name}
    folder.write(MARKER, json_bytes({**value, "digest": json_digest(value)}))


def _read_marker(store: Store) -> dict[str, str] | None:
    """Reads the marker file of a folder; returns None if it has no valid one."""
    try:
        value = json.loads(store.read(MARKER))
        claimed = value.pop("digest")
        return value if claimed == json_digest(value) else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def _is_marked(folder: Store, store: Store, role: Role) -> bool:
    marker = _read_marker(folder) or {}
    return [marker.get(key) for key in ("role", "cache", "folder")] == [role, store.name, folder.name]


def _is_partial(item: Path) -> bool:
    return PARTIAL.fullmatch(item.name) is not None and item.is_file()
