"""Datasets under URLs of object stores: each is copied once to this machine, and read there.

HDF5 reads its metadata in thousands of small pieces, and training with a live encoder reads every frame many times, so
a copy is faster than requests (docs/scale.md has the figures). A copy lies at
``~/.cache/cache_pipeline/datasets/s3/BUCKET/KEY``; the environment variable ``CACHE_PIPELINE_HOME`` names another
folder than ``~/.cache/cache_pipeline``. Its modification time is that of the object, with nanoseconds taken from the
object's entity tag, so that size and time of a copy tell whether it is the object's.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cache_pipeline.demos.layouts.protocol import FOLDERS, FileStamp, folder_state
from cache_pipeline.errors import ChangedError, ConfigError, DatasetError
from cache_pipeline.files import SCHEME, digest, resolved
from cache_pipeline.object_storage import Bucket, ObjectUrl, obstore
from cache_pipeline.progress import Progress
from cache_pipeline.text import listed

logger = logging.getLogger("cache_pipeline")

HOME = "CACHE_PIPELINE_HOME"
PIECE = 8 << 20
PIECES_AT_ONCE = 8
MEGABYTE = 1_000_000
NANOSECONDS = 1_000_000_000

AnyPath = str | os.PathLike[str]


class _Object(NamedTuple):
    """One object of a dataset; ``name`` is its path inside a dataset folder, or empty."""

    name: str
    size: int
    mtime_ns: int
    tag: str


def url_of(path: AnyPath) -> str | None:
    """Returns the URL that a path spells, or None for a local path.

    ``Path`` drops the second slash of ``s3://bucket/lift.hdf5``; it is put back.
    """
    text = os.fspath(path)
    found = SCHEME.match(text)
    if found is None or found[1].lower() == "file":
        return None
    return f"{found[1]}://{text[found.end() :]}".rstrip("/")


def recorded_path(path: AnyPath) -> str:
    """Returns what records keep of a dataset: the URL, also of its copy, or the absolute path without links."""
    url = url_of(path)
    if url is not None:
        return url
    real, copies = resolved(Path(path)), resolved(_copies())
    if not real.is_relative_to(copies) or len(real.relative_to(copies).parts) < 3:
        return str(real)
    scheme, *parts = real.relative_to(copies).parts
    return f"{scheme}://{'/'.join(parts)}"


def local_path(path: AnyPath) -> Path:
    """Returns a local path unchanged, and for a URL the path of its copy, which is made or brought up to date.

    A copy that breaks off goes on where it stopped.

    Raises:
        DatasetError: there is nothing under the URL.
        ConfigError: the URL is of another kind, or the disk has not enough space.
        ChangedError: the object was replaced while it was copied.
        StoreError, MissingExtraError: the object store cannot be reached.
    """
    url = url_of(path)
    if url is None:
        scheme = SCHEME.match(os.fspath(path))
        return Path(f"/{os.fspath(path)[scheme.end() :]}" if scheme else path).expanduser()
    bucket, key = _bucket_of(url)
    objects = _objects(bucket, key)
    if not objects:
        near = _files_beside(bucket, key)
        beside = f"beside it there are {listed(near)}" if near else "check the URL"
        raise DatasetError(f"there is no HDF5 file {url}, and no LeRobot folder there; {beside}")
    target = _copies().joinpath(*url.replace("://", "/").split("/"))
    if not _is_copy(target, objects):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target):
            for found in objects:
                _copy(bucket, f"{key}/{found.name}".rstrip("/"), target / found.name, found)
            if objects[0].name:
                _remove_others(target, {found.name for found in objects})
    return target


def has_dataset(url: str) -> bool:
    """Whether a file or a LeRobot folder lies under a URL. Asks for two objects at most."""
    bucket, key = _bucket_of(url)
    return any(_head(bucket, name) is not None for name in (key, f"{key}/meta/info.json"))


def stamp_of(path: AnyPath) -> FileStamp:
    """Returns size and time of a local file or folder, or of what is under a URL now.

    Raises:
        FileNotFoundError: there is nothing.
        StoreError, MissingExtraError: the object store cannot be reached.
    """
    url = url_of(path)
    if url is None:
        return FileStamp.of(Path(path))
    objects = _objects(*_bucket_of(url))
    if not objects:
        raise FileNotFoundError(f"there is no object {url}")
    return _stamp(Path(path), objects)


def is_there(path: AnyPath) -> bool:
    """Whether a file or folder exists, or a dataset under a URL; raises StoreError as :func:`stamp_of`."""
    url = url_of(path)
    return Path(path).exists() if url is None else has_dataset(url)


def _stamp(path: Path, objects: Sequence[_Object]) -> FileStamp:
    if not objects[0].name:
        return FileStamp(path, objects[0].size, objects[0].mtime_ns)
    return FileStamp(path, *folder_state([(found.name, found.size, found.mtime_ns) for found in objects]))


def _copies() -> Path:
    home = os.environ.get(HOME)
    return (Path(home) if home else Path.home() / ".cache" / "cache_pipeline") / "datasets"


def _bucket_of(url: str) -> tuple[Bucket, str]:
    where = ObjectUrl.parse(url, "lift.hdf5")
    if any(part in ("", ".", "..") for part in where.key.split("/")):
        raise ConfigError(f"{url}: a key with an empty, . or .. part has no local path; rename the object")
    return Bucket(where.bucket, url), where.key


def _objects(bucket: Bucket, key: str) -> list[_Object]:
    """Returns the object of a file, or those of a LeRobot folder, sorted by name."""
    alone = _head(bucket, key)
    if alone is not None:
        return [alone]
    if _head(bucket, f"{key}/meta/info.json") is None:
        return []
    inside: list[_Object] = []
    for folder in FOLDERS:
        inside += bucket.ask(f"{key}/{folder}", lambda store, prefix: _listed(store, prefix, f"{key}/"))
    return sorted(inside)


def _files_beside(bucket: Bucket, key: str) -> list[str]:
    """Returns the names of the HDF5 files in the folder of a key; raises StoreError if the bucket does not exist."""
    folder = key.rpartition("/")[0]
    found = bucket.ask(folder, lambda store, prefix: obstore().list_with_delimiter(store, prefix or None)["objects"])
    names = [meta["path"].rpartition("/")[2] for meta in found]
    return sorted(name for name in names if name.endswith(".hdf5"))


def _head(bucket: Bucket, key: str) -> _Object | None:
    try:
        return _described("", bucket.ask(key, lambda store, name: obstore().head(store, name)))
    except FileNotFoundError:
        return None


def _listed(store: Any, prefix: str, root: str) -> list[_Object]:
    pages = obstore().list(store, prefix)
    return [_described(meta["path"].removeprefix(root), meta) for page in pages for meta in page]


def _described(name: str, meta: Any) -> _Object:
    tag = (meta["e_tag"] or meta.get("version") or "").strip('"')
    seconds = int(meta["last_modified"].timestamp())  # a listing has fractions that the object's header has not
    return _Object(name, meta["size"], seconds * NANOSECONDS + int(digest(tag.encode())[:12], 16) % NANOSECONDS, tag)


def _is_copy(target: Path, objects: Sequence[_Object]) -> bool:
    """Whether a path holds a copy of all objects, and of no others."""
    try:
        now = FileStamp.of(target)
    except FileNotFoundError:
        return False
    return now[1:] == _stamp(target, objects)[1:]


def _copy(bucket: Bucket, key: str, target: Path, found: _Object) -> None:
    if _is_copy(target, [found._replace(name="")]):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{digest(found.tag.encode())[:8]}.partial")
    for other in target.parent.iterdir():
        if other.name.startswith(f".{target.name}.") and other.suffix == ".partial" and other != unfinished:
            other.unlink()
    _download(bucket, key, unfinished, found.size)
    now = _head(bucket, key)
    if now is None or now.tag != found.tag:
        unfinished.unlink()
        raise ChangedError(f"{bucket.url}/{key} was written while it was copied; run the same command again")
    os.utime(unfinished, ns=(found.mtime_ns, found.mtime_ns))
    unfinished.replace(target)


def _download(bucket: Bucket, key: str, file: Path, size: int) -> None:
    """Appends what ``file`` lacks of an object."""
    done = file.stat().st_size if file.exists() else 0
    free = shutil.disk_usage(file.parent).free
    if free < size - done:
        raise ConfigError(
            f"{bucket.url}/{key} has {size / MEGABYTE:.0f} MB, but {file.parent} has {free / MEGABYTE:.0f} MB free; "
            f"free some space, or name another folder for copies with {HOME}"
        )
    logger.info("copying %s/%s (%.1f MB) to %s", bucket.url, key, size / MEGABYTE, file.parent)
    with file.open("ab") as opened, Progress("copy", size, "bytes", done) as bar:
        while done < size:
            stop = min(done + PIECE * PIECES_AT_ONCE, size)
            for piece in bucket.ask(key, partial(_ranges, done, stop)):
                opened.write(piece)
            opened.flush()
            os.fsync(opened.fileno())  # a later process trusts what is there
            bar.advance(stop - done)
            done = stop


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Keeps other processes from copying the same object."""
    with target.with_name(f".{target.name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _ranges(start: int, stop: int, store: Any, key: str) -> list[Any]:
    starts = list(range(start, stop, PIECE))
    return list(obstore().get_ranges(store, key, starts=starts, lengths=[min(PIECE, stop - at) for at in starts]))


def _remove_others(target: Path, names: set[str]) -> None:
    """Removes files of a copied folder that its URL does not have any more."""
    for folder in FOLDERS:
        for file in (target / folder).rglob("*"):
            if file.is_file() and str(file.relative_to(target)) not in names:
                file.unlink()
