"""A cache on an object store: S3, Google Cloud Storage, Azure, or memory, through obstore.

Credentials and endpoints come from the environment, as each provider's own tools read them. Requests that fail are
repeated with growing pauses by obstore's own retries.
"""

from __future__ import annotations

import errno
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from cache_pipeline.cache.store_protocol import Buffer, OpenObject, Stamp, Store
from cache_pipeline.errors import ChangedError, ConfigError, MissingExtraError, StoreError, available, install_command
from cache_pipeline.text import shortened

SCHEMES = ("s3", "gs", "az", "memory")
FIRST_RETRIES = {"max_retries": 3, "retry_timeout": timedelta(seconds=10)}
"""Of the first request, so that a wrong endpoint is told within seconds."""
RETRIES = {"max_retries": 10, "retry_timeout": timedelta(seconds=180)}
TIMEOUTS = {"connect_timeout": "5s", "timeout": "120s"}
ATTEMPTS = 5
"""Of a request whose answer breaks off: obstore repeats a refused request, but not one that it has begun to read, nor a
conditional write whose answer is lost."""
MOST_TAILS = 4096
"""Indexes of shards that are kept, some kilobytes each: a row then takes one request, not two."""
NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|bucket does not exist", re.IGNORECASE)
_memory: dict[str, Any] = {}
_process: list[int] = []
"""The process in which obstore has started its threads, which a forked process does not have."""


class ObjectStore:
    """The objects under a URL, ``scheme://bucket/prefix``. Safe to pickle: each process opens its own connection.

    Raises:
        ConfigError: the URL has another scheme, or no bucket or prefix.
        MissingExtraError: obstore is not installed.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES:
            raise ConfigError(f"{url}: {parts.scheme}:// is not a kind of store; {available(SCHEMES, parts.scheme)}")
        if not parts.netloc or not parts.path.strip("/"):
            raise ConfigError(f"{url} names no bucket and folder; give {parts.scheme}://BUCKET/NAME.zarr")
        self.place = url.rstrip("/")
        self._bucket = f"{parts.scheme}://{parts.netloc}"
        self._prefix = parts.path.strip("/")
        self._process, self._opened = 0, None
        self._tails: OrderedDict[str, tuple[bytes, int]] = OrderedDict()

    def read(self, name: str) -> bytes:
        return bytes(self._ask(name, lambda store, key: _obstore().get(store, key).bytes()))

    @contextmanager
    def open(self, name: str) -> Iterator[OpenObject]:
        yield _OpenKey(self, name)

    def stamp(self, name: str) -> Stamp | None:
        try:
            found = self._ask(name, lambda store, key: _obstore().head(store, key))
        except FileNotFoundError:
            return None
        stamp: Stamp = found["e_tag"]
        return stamp

    def write(self, name: str, *parts: bytes | Buffer) -> None:
        data = b"".join(parts)
        self._tails.pop(name, None)
        self._ask(name, lambda store, key: _obstore().put(store, key, data, use_multipart=False))

    def write_after(self, name: str, stamp: Stamp | None, *parts: bytes | Buffer) -> Stamp | None:
        data = b"".join(parts)
        self._tails.pop(name, None)
        mode: Any = "create" if stamp is None else {"e_tag": stamp}
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        def put(store: Any, key: str) -> Stamp:
            try:
                made: Stamp = _obstore().put(store, key, data, mode=mode, use_multipart=False)["e_tag"]
                return made
            except (AlreadyExistsError, PreconditionError) as error:
                # An earlier attempt may have been carried out although its answer was lost.
                found = _obstore().get(store, key)
                if bytes(found.bytes()) != data:
                    raise ChangedError(f"{self._url(name)} was written by another process meanwhile") from error
                there: Stamp = found.meta["e_tag"]
                return there

        written: Stamp = self._ask(name, put)
        return written

    def delete(self, name: str) -> None:
        self._tails.pop(name, None)
        with suppress(FileNotFoundError):
            self._ask(name, lambda store, key: _obstore().delete(store, key))

    def sizes(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        def listed(store: Any, key: str) -> list[tuple[str, int]]:
            found = [item for page in _obstore().list(store, key.rstrip("/")) for item in page]
            return [(item["path"].removeprefix(f"{self._prefix}/"), item["size"]) for item in found]

        yield from self._ask(prefix, listed)

    def copy_from(self, other: ObjectStore, name: str) -> None:
        """Copies an object of another store of the same bucket, inside the object store."""
        source = other._key(name)
        self._tails.pop(name, None)
        self._ask(name, lambda store, key: _obstore().copy(store, source, key))

    def sibling(self, name: str) -> ObjectStore:
        return ObjectStore(f"{self.place.rpartition('/')[0]}/{name}")

    def siblings(self, prefix: str) -> list[str]:
        around = self._prefix.rpartition("/")[0]

        def listed(store: Any, key: str) -> list[str]:
            found = _obstore().list_with_delimiter(store, around or None)["common_prefixes"]
            return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

        return [name for name in self._ask("", listed) if name.startswith(prefix)]

    @property
    def name(self) -> str:
        return self.place.rpartition("/")[2]

    @property
    def parents(self) -> Iterator[Store]:
        folders = self._prefix.split("/")[:-1]
        return (ObjectStore(f"{self._bucket}/{'/'.join(folders[:n])}") for n in range(len(folders), 0, -1))

    def zarr(self, name: str, *, read_only: bool) -> tuple[Any, str]:
        from zarr.storage import ObjectStore as ZarrStore

        return ZarrStore(self._store(), read_only=read_only), self._key(name)

    def _url(self, name: str) -> str:
        return f"{self.place}/{name}".rstrip("/")

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if name else self._prefix

    def _store(self) -> Any:
        """Returns obstore's store of the bucket, opened in this process; the first time, asks whether it answers."""
        if _process and _process != [os.getpid()]:
            raise StoreError(
                f"{self.place} cannot be read in a forked process; start workers with spawn, such as "
                "DataLoader(…, multiprocessing_context='spawn')"
            )
        if self._process != os.getpid():
            _process[:] = [os.getpid()]
            first = _open_bucket(self._bucket, FIRST_RETRIES)
            with _described(f"{self.place}"):
                try:
                    _obstore().head(first, self._key("manifest.json"))
                except FileNotFoundError as error:
                    _check_bucket(error, self._bucket)
            self._opened, self._process = _open_bucket(self._bucket, RETRIES), os.getpid()
        return self._opened

    def _ask(self, name: str, request: Callable[[Any, str], Any]) -> Any:
        store, key = self._store(), self._key(name)
        from obstore.exceptions import GenericError

        for attempt in range(ATTEMPTS):
            with _described(self._url(name)):
                try:
                    return request(store, key)
                except FileNotFoundError as error:
                    _check_bucket(error, self._bucket)
                    raise FileNotFoundError(errno.ENOENT, "no such object", self._url(name)) from error
                except GenericError:
                    if attempt == ATTEMPTS - 1:
                        raise
        raise AssertionError("unreachable")

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectStore, (self.place,)

    def __repr__(self) -> str:
        return f"ObjectStore({self.place!r})"


class _OpenKey:
    """Reads parts of one object; the ranges of one call go out together."""

    at_once = 64 << 20

    def __init__(self, store: ObjectStore, name: str) -> None:
        self._store, self._name = store, name

    def tail(self, count: int) -> tuple[bytes, int]:
        tails = self._store._tails
        if self._name not in tails:
            tails[self._name] = self._store._ask(self._name, lambda store, key: _tail(store, key, count))
            if len(tails) > MOST_TAILS:
                tails.popitem(last=False)
        return tails[self._name]

    def read_runs(self, runs: Sequence[tuple[int, Sequence[Buffer]]]) -> Iterator[int]:
        starts = [offset for offset, _ in runs]
        lengths = [sum(memoryview(buffer).nbytes for buffer in buffers) for _, buffers in runs]

        def ranges(store: Any, key: str) -> list[Any]:
            return _obstore().get_ranges(store, key, starts=starts, lengths=lengths)

        for (_, buffers), found in zip(runs, self._store._ask(self._name, ranges), strict=True):
            data, at = np.frombuffer(found, np.uint8), 0
            for buffer in buffers:
                target = np.asarray(buffer).reshape(-1).view(np.uint8)
                part = data[at : at + target.size]
                target[: len(part)] = part
                at += target.size
            yield len(data)


def _tail(store: Any, key: str, count: int) -> tuple[bytes, int]:
    from obstore.exceptions import NotSupportedError

    try:
        found = _obstore().get(store, key, options={"range": {"suffix": count}})
        return bytes(found.bytes()), found.meta["size"]
    except NotSupportedError:  # Azure
        size = _obstore().head(store, key)["size"]
        return bytes(_obstore().get_range(store, key, start=max(0, size - count), end=size)), size


def _open_bucket(bucket: str, retries: dict[str, Any]) -> Any:
    _obstore()
    from obstore.store import MemoryStore, from_url

    if bucket.startswith("memory://"):
        return _memory.setdefault(bucket, MemoryStore())
    plain = any(os.environ.get(name, "").startswith("http://") for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT"))
    options = {**TIMEOUTS, **({"allow_http": True} if plain else {})}
    with _described(bucket):
        return from_url(bucket, retry_config=retries, client_options=options)


def _obstore() -> Any:
    try:
        import obstore
    except ImportError as error:
        raise MissingExtraError(
            f"a cache on an object store needs the package obstore; install it with {install_command('remote')}"
        ) from error
    return obstore


def _check_bucket(error: Exception, bucket: str) -> None:
    if NO_BUCKET.search(str(error)):
        raise StoreError(f"the bucket {bucket} does not exist; create it, or correct the URL") from error


@contextmanager
def _described(url: str) -> Iterator[None]:
    """Turns an error of obstore into one line."""
    _obstore()
    from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

    try:
        yield
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise StoreError(f"{url}: access is denied ({_first_line(error)}); check the credentials") from error
    except BaseError as error:
        raise StoreError(
            f"{url} cannot be reached ({_first_line(error)}); check the endpoint, the network and the credentials, "
            "then run the same command again"
        ) from error


def _first_line(error: Exception) -> str:
    return shortened(
        next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip(), 200
    )
