"""What a place must offer to hold a cache: named objects that are read, in whole or in parts, and written whole."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from cache_pipeline.files import Location

Stamp = Hashable
"""Changes whenever an object is written again: e-tag of an object, or inode, time and size of a file."""
Buffer = Any
"""Writable bytes, such as a uint8 array."""


class OpenObject(Protocol):
    """An object that is open for reading.

    Attributes:
        at_once: bytes to ask for in one call: few from a disk, so that they are still in the CPU's cache when they are
            used, and many over a network, so that its requests go out together.
    """

    at_once: int

    def tail(self, count: int) -> tuple[bytes, int]:
        """Returns the last ``count`` bytes, or all if there are fewer, and the size of the object."""

    def read_runs(self, runs: Sequence[tuple[int, Sequence[Buffer]]]) -> Iterator[int]:
        """Fills the buffers of each run, which lie one after another from its offset on; yields the bytes read."""


class Store(Protocol):
    """Named objects under one place. Methods raise ``FileNotFoundError`` for a missing object, ``OSError`` for a fault
    of the disk and ``StoreError`` for one of the network."""

    @property
    def place(self) -> Location:
        """The folder or the URL, for messages and to open it again."""

    def read(self, name: str) -> bytes:
        """Returns a whole object."""

    def open(self, name: str) -> AbstractContextManager[OpenObject]:
        """Opens an object for reading parts of it."""

    def stamp(self, name: str) -> Stamp | None:
        """Returns the stamp of an object, None if it is missing."""

    def write(self, name: str, *parts: bytes | Buffer) -> None:
        """Writes an object from its parts, and waits until it is safe."""

    def write_after(self, name: str, stamp: Stamp | None, *parts: bytes | Buffer) -> Stamp | None:
        """Writes an object unless it has changed; ``stamp`` is what :meth:`stamp` returned. Returns the new stamp.

        Raises:
            ChangedError: somebody else has written it meanwhile.
        """

    def delete(self, name: str) -> None:
        """Removes an object, if it exists."""

    def sizes(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """Yields name and size of every object whose name starts with ``prefix``, a folder name with its slash."""

    def sibling(self, name: str) -> Store:
        """Returns the store of this name beside this one."""

    def siblings(self, prefix: str) -> list[str]:
        """Returns the names of folders beside this one that start with ``prefix``, sorted."""

    @property
    def name(self) -> str:
        """The last part of the place."""

    @property
    def parents(self) -> Iterator[Store]:
        """The folders around this one, from the inside out."""

    def zarr(self, name: str, *, read_only: bool) -> tuple[Any, str]:
        """Returns the zarr store and the path inside it of an array or group."""
