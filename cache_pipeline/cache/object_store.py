"""A cache under the URL of an object store."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from cache_pipeline.cache.store_protocol import Buffer, OpenObject, Stamp, Store
from cache_pipeline.errors import ChangedError
from cache_pipeline.object_storage import Bucket, ObjectUrl, obstore

MOST_TAILS = 4096
"""Indexes of shards that are kept, some kilobytes each: a row then takes one request, not two."""


class ObjectStore:
    """The objects under a URL, ``scheme://bucket/prefix``. Safe to pickle: each process opens its own connection.

    Raises:
        ConfigError: the URL has another scheme, or no bucket or prefix.
        MissingExtraError: obstore is not installed.
    """

    def __init__(self, url: str) -> None:
        where = ObjectUrl.parse(url)
        self.place = url.rstrip("/")
        self._bucket, self._prefix = Bucket(where.bucket, self.place), where.key
        self._tails: OrderedDict[str, tuple[bytes, int]] = OrderedDict()

    def read(self, name: str) -> bytes:
        return bytes(self._ask(name, lambda store, key: obstore().get(store, key).bytes()))

    @contextmanager
    def open(self, name: str) -> Iterator[OpenObject]:
        yield _OpenKey(self, name)

    def stamp(self, name: str) -> Stamp | None:
        try:
            found = self._ask(name, lambda store, key: obstore().head(store, key))
        except FileNotFoundError:
            return None
        stamp: Stamp = found["e_tag"]
        return stamp

    def write(self, name: str, *parts: bytes | Buffer) -> None:
        data = b"".join(parts)
        self._tails.pop(name, None)
        self._ask(name, lambda store, key: obstore().put(store, key, data, use_multipart=False))

    def write_after(self, name: str, stamp: Stamp | None, *parts: bytes | Buffer) -> Stamp | None:
        data = b"".join(parts)
        self._tails.pop(name, None)
        mode: Any = "create" if stamp is None else {"e_tag": stamp}
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        def put(store: Any, key: str) -> Stamp:
            try:
                made: Stamp = obstore().put(store, key, data, mode=mode, use_multipart=False)["e_tag"]
                return made
            except (AlreadyExistsError, PreconditionError) as error:
                # An earlier attempt may have been carried out although its answer was lost.
                found = obstore().get(store, key)
                if bytes(found.bytes()) != data:
                    raise ChangedError(f"{self._url(name)} was written by another process meanwhile") from error
                there: Stamp = found.meta["e_tag"]
                return there

        written: Stamp = self._ask(name, put)
        return written

    def delete(self, name: str) -> None:
        self._tails.pop(name, None)
        with suppress(FileNotFoundError):
            self._ask(name, lambda store, key: obstore().delete(store, key))

    def sizes(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        def listed(store: Any, key: str) -> list[tuple[str, int]]:
            found = [item for page in obstore().list(store, key.rstrip("/")) for item in page]
            return [(item["path"].removeprefix(f"{self._prefix}/"), item["size"]) for item in found]

        yield from self._ask(prefix, listed)

    def copy_from(self, other: ObjectStore, name: str) -> None:
        """Copies an object of another store of the same bucket, inside the object store."""
        source = other._key(name)
        self._tails.pop(name, None)
        self._ask(name, lambda store, key: obstore().copy(store, source, key))

    def sibling(self, name: str) -> ObjectStore:
        return ObjectStore(f"{self.place.rpartition('/')[0]}/{name}")

    def siblings(self, prefix: str) -> list[str]:
        around = self._prefix.rpartition("/")[0]

        def listed(store: Any, key: str) -> list[str]:
            found = obstore().list_with_delimiter(store, around or None)["common_prefixes"]
            return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

        return [name for name in self._ask("", listed) if name.startswith(prefix)]

    @property
    def name(self) -> str:
        return self.place.rpartition("/")[2]

    @property
    def parents(self) -> Iterator[Store]:
        folders = self._prefix.split("/")[:-1]
        return (ObjectStore(f"{self._bucket.url}/{'/'.join(folders[:n])}") for n in range(len(folders), 0, -1))

    def zarr(self, name: str, *, read_only: bool) -> tuple[Any, str]:
        from zarr.storage import ObjectStore as ZarrStore

        return ZarrStore(self._bucket.store(self._key("manifest.json")), read_only=read_only), self._key(name)

    def _url(self, name: str) -> str:
        return f"{self.place}/{name}".rstrip("/")

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if name else self._prefix

    def _ask(self, name: str, request: Callable[[Any, str], Any]) -> Any:
        return self._bucket.ask(self._key(name), request)

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
            return obstore().get_ranges(store, key, starts=starts, lengths=lengths)

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
        found = obstore().get(store, key, options={"range": {"suffix": count}})
        return bytes(found.bytes()), found.meta["size"]
    except NotSupportedError:  # Azure
        size = obstore().head(store, key)["size"]
        return bytes(obstore().get_range(store, key, start=max(0, size - count), end=size)), size
