"""Buckets of object stores: S3, Google Cloud Storage, Azure, or memory, through obstore.

Credentials and endpoints come from the environment, as each provider's own tools read them. Requests that fail are
repeated with growing pauses by obstore's own retries.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from cache_pipeline.errors import ConfigError, MissingExtraError, StoreError, available, install_command
from cache_pipeline.text import shortened

SCHEMES = ("s3", "gs", "az", "memory")
FIRST_RETRIES = {"max_retries": 3, "retry_timeout": timedelta(seconds=10)}
"""Of the first request, so that a wrong endpoint is told within seconds."""
RETRIES = {"max_retries": 10, "retry_timeout": timedelta(seconds=180)}
TIMEOUTS = {"connect_timeout": "5s", "timeout": "120s"}
ATTEMPTS = 5
"""Of a request whose answer breaks off: obstore repeats a refused request, but not one that it has begun to read, nor a
conditional write whose answer is lost."""
NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|bucket does not exist", re.IGNORECASE)
_memory: dict[str, Any] = {}
_process: list[int] = []
"""The process in which obstore has started its threads, which a forked process does not have."""


class ObjectUrl(NamedTuple):
    """The two parts of ``scheme://bucket/key``; ``bucket`` includes the scheme."""

    bucket: str
    key: str

    @classmethod
    def parse(cls, url: str, example: str = "NAME.zarr") -> ObjectUrl:
        """Splits a URL; raises ConfigError for another scheme, or without bucket or key."""
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES:
            raise ConfigError(f"{url}: {parts.scheme}:// is not a kind of store; {available(SCHEMES, parts.scheme)}")
        if not parts.netloc or not parts.path.strip("/"):
            raise ConfigError(f"{url} names no bucket and folder; give {parts.scheme}://BUCKET/{example}")
        return cls(f"{parts.scheme}://{parts.netloc}", parts.path.strip("/"))


class Bucket:
    """A connection to a bucket, such as ``s3://name``, opened in the process that uses it.

    ``place`` is what the user named, for the message of a bucket that does not answer.
    """

    def __init__(self, url: str, place: str) -> None:
        self.url, self._place = url, place
        self._process, self._opened = 0, None

    def store(self, key: str) -> Any:
        """Returns obstore's store, opened in this process; the first time, asks for ``key`` to see whether it answers.

        Raises:
            StoreError: the bucket does not answer or exist, access is denied, or the process is a forked one.
            MissingExtraError: obstore is not installed.
        """
        if _process and _process != [os.getpid()]:
            raise StoreError(
                f"{self._place} cannot be read in a forked process; start workers with spawn, such as "
                "DataLoader(…, multiprocessing_context='spawn')"
            )
        if self._process != os.getpid():
            _process[:] = [os.getpid()]
            first = _open(self.url, FIRST_RETRIES)
            with _described(self._place):
                try:
                    obstore().head(first, key)
                except FileNotFoundError as error:
                    _check_bucket(error, self.url)
            self._opened, self._process = _open(self.url, RETRIES), os.getpid()
        return self._opened

    def ask(self, key: str, request: Callable[[Any, str], Any]) -> Any:
        """Returns ``request(store, key)``, repeated if an answer breaks off; raises also FileNotFoundError."""
        store = self.store(key)
        from obstore.exceptions import GenericError

        for attempt in range(ATTEMPTS):
            with _described(f"{self.url}/{key}"):
                try:
                    return request(store, key)
                except FileNotFoundError as error:
                    _check_bucket(error, self.url)
                    raise FileNotFoundError(errno.ENOENT, "no such object", f"{self.url}/{key}") from error
                except GenericError:
                    if attempt == ATTEMPTS - 1:
                        raise
        raise AssertionError("unreachable")


def obstore() -> Any:
    """Imports obstore; raises MissingExtraError if it is not installed."""
    try:
        import obstore
    except ImportError as error:
        raise MissingExtraError(
            f"a URL of an object store needs the package obstore; install it with {install_command('remote')}"
        ) from error
    return obstore


def _open(bucket: str, retries: dict[str, Any]) -> Any:
    obstore()
    from obstore.store import MemoryStore, from_url

    if bucket.startswith("memory://"):
        return _memory.setdefault(bucket, MemoryStore())
    plain = any(os.environ.get(name, "").startswith("http://") for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT"))
    options = {**TIMEOUTS, **({"allow_http": True} if plain else {})}
    with _described(bucket):
        return from_url(bucket, retry_config=retries, client_options=options)


def _check_bucket(error: Exception, bucket: str) -> None:
    if NO_BUCKET.search(str(error)):
        raise StoreError(f"the bucket {bucket} does not exist; create it, or correct the URL") from error


@contextmanager
def _described(url: str) -> Iterator[None]:
    """Turns an error of obstore into one line."""
    obstore()
    from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

    try:
        yield
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise StoreError(f"{url}: access is denied ({_first_line(error)}); check the credentials") from error
    except BaseError as error:
        _check_bucket(error, "/".join(url.split("/")[:3]))
        raise StoreError(
            f"{url} cannot be reached ({_first_line(error)}); check the endpoint, the network and the credentials, "
            "then run the same command again"
        ) from error


def _first_line(error: Exception) -> str:
    return shortened(
        next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip(), 200
    )
