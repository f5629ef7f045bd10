"""Reads uncompressed zarr shards directly into the caller's array, and writes them; checks every checksum.

zarr reads the same files, but needs a task and a copy for each chunk, which take ten times as long as the read itself.
A shard has the layout of zarr v3's ``sharding_indexed``: chunks (values, then their CRC-32C), then an index of
(offset, bytes) per chunk, then the CRC-32C of the index. A chunk that holds only fill values, such as one whose rows
are all dead, is marked as empty in the index and takes no bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import crc32c
import numpy as np
from numpy.typing import NDArray

from cache_pipeline.cache.store_protocol import OpenObject, Stamp, Store

CRC_BYTES = 4
EMPTY = (1 << 64) - 1  # offset and size of an empty chunk
MAX_PIECES = 500  # half of IOV_MAX
CALL_BYTES = 1 << 20  # bytes per system call: small enough to be in the CPU cache when the checksum is computed


class ShardLayout(NamedTuple):
    """Layout of a shard that is split into chunks along the rows only.

    Attributes:
        chunks: number of chunks.
        chunk_bytes: size of one chunk without its checksum.
        fill: bytes of one fill value.
    """

    chunks: int
    chunk_bytes: int
    fill: bytes

    def fill_chunk(self, chunk: NDArray[np.uint8]) -> None:
        """Fills one chunk with the fill value."""
        chunk.reshape(-1, len(self.fill))[...] = np.frombuffer(self.fill, np.uint8)

    @property
    def index_bytes(self) -> int:
        """Bytes of the index with its checksum."""
        return 16 * self.chunks + CRC_BYTES


def uncompressed_layout(metadata: dict[str, Any]) -> ShardLayout | None:
    """Returns the layout of an array's shards if :func:`open_shard` can read them, else None.

    Args:
        metadata: the array's ``zarr.json``.
    """
    codecs = metadata["codecs"]
    if len(codecs) != 1 or codecs[0]["name"] != "sharding_indexed":
        return None
    sharding = codecs[0]["configuration"]
    inner, index = ([codec["name"] for codec in sharding[key]] for key in ("codecs", "index_codecs"))
    if inner != ["bytes", "crc32c"] or index != ["bytes", "crc32c"] or sharding.get("index_location", "end") != "end":
        return None
    dtype = np.dtype(metadata["data_type"])
    fill = np.array(metadata["fill_value"], dtype).tobytes()
    shard, chunk = metadata["chunk_grid"]["configuration"]["chunk_shape"], sharding["chunk_shape"]
    return ShardLayout(int(np.prod(shard)) // int(np.prod(chunk)), int(np.prod(chunk)) * dtype.itemsize, fill)


class OpenShard:
    """A shard open for reading. Every method checks the checksum of each chunk that it reads.

    Raises:
        OSError, StoreError: the shard cannot be read.
        ValueError: a checksum, an offset or the shard's size is wrong.
    """

    def __init__(self, opened: OpenObject, layout: ShardLayout) -> None:
        self._opened, self._layout = opened, layout
        self._offsets = _read_index(opened, layout)

    def read_span(self, start: int, out: NDArray[np.uint8]) -> None:
        """Reads rows from ``start`` on into ``out``, (n, bytes of a row); whole chunks without a copy."""
        size = self._layout.chunk_bytes // out.shape[1]
        stop = start + len(out)
        first, last = start // size, -(-stop // size)
        low, high = -(-start // size), stop // size
        if low > high:  # within one chunk
            low = high = last
        pieces: list[NDArray[np.uint8]] = []
        edges = []
        for chunk in (*range(first, low), *range(high, last)):
            begin, end = max(start, chunk * size), min(stop, (chunk + 1) * size)
            edge = np.empty((size, out.shape[1]), np.uint8)
            edges.append((out[begin - start : end - start], edge[begin - chunk * size : end - chunk * size], edge))
        pieces += [edge.reshape(-1) for _, _, edge in edges[: low - first]]
        if high > low:
            pieces += list(out[low * size - start : high * size - start].reshape(-1, self._layout.chunk_bytes))
        pieces += [edge.reshape(-1) for _, _, edge in edges[low - first :]]
        self._read_chunks(range(first, last), pieces)
        for wanted, read, _ in edges:
            wanted[...] = read

    def read_rows(self, rows: NDArray[np.integer], out: NDArray[np.uint8]) -> None:
        """Reads rows in ascending order into ``out``, (n, bytes of a row), and each chunk once."""
        size = self._layout.chunk_bytes // out.shape[1]
        chunks = rows // size
        firsts = np.flatnonzero(np.diff(chunks, prepend=-1))  # of each chunk, its first row here
        step = max(1, self._opened.at_once // self._layout.chunk_bytes)
        for at in range(0, len(firsts), step):
            begin, end = int(firsts[at]), int(firsts[at + step]) if at + step < len(firsts) else len(rows)
            wanted = chunks[firsts[at : at + step]]
            read = np.empty((len(wanted), self._layout.chunk_bytes), np.uint8)
            self._read_chunks(wanted.tolist(), list(read))
            places = np.searchsorted(wanted, chunks[begin:end])
            out[begin:end] = read.reshape(-1, out.shape[1])[places * size + rows[begin:end] % size]

    def _read_chunks(self, chunks: Sequence[int], pieces: Sequence[NDArray[np.uint8]]) -> None:
        """Reads chunks, each into its own array; chunks that lie one after another go into one run."""
        size = self._layout.chunk_bytes + CRC_BYTES
        most = min(MAX_PIECES, max(1, CALL_BYTES // size))
        runs: list[tuple[int, list[NDArray[np.uint8]]]] = []
        end = -1
        for chunk, piece in zip(chunks, pieces, strict=True):
            offset = self._offsets[chunk]
            if offset == EMPTY:
                self._layout.fill_chunk(piece)
                continue
            if offset != end or len(runs[-1][1]) == most:
                runs.append((offset, []))
            runs[-1][1].append(piece)
            end = offset + size
        if runs:
            _read_runs(self._opened, runs)


@contextmanager
def open_shard(store: Store, name: str, layout: ShardLayout) -> Iterator[OpenShard]:
    """Opens one shard and checks its index."""
    with store.open(name) as opened:
        yield OpenShard(opened, layout)


def write_shard(
    store: Store, name: str, layout: ShardLayout, values: NDArray[np.uint8], after: Stamp | None = None
) -> None:
    """Writes a whole shard, (chunks, chunk_bytes), unless it has another stamp than ``after``; None: it is missing."""
    assert values.shape == (layout.chunks, layout.chunk_bytes), (values.shape, layout)
    filled = np.empty(layout.chunk_bytes, np.uint8)
    layout.fill_chunk(filled)
    index = np.full((layout.chunks, 2), EMPTY, "<u8")
    parts: list[Any] = []
    stored = 0
    for number, chunk in enumerate(values):
        if np.array_equal(chunk, filled):
            continue
        index[number] = stored, layout.chunk_bytes + CRC_BYTES
        parts += [chunk, crc32c.crc32c(chunk).to_bytes(CRC_BYTES, "little")]
        stored += layout.chunk_bytes + CRC_BYTES
    parts += [index.tobytes(), crc32c.crc32c(index.tobytes()).to_bytes(CRC_BYTES, "little")]
    store.write_after(name, after, *parts)


def _read_index(opened: OpenObject, layout: ShardLayout) -> list[int]:
    """Reads the index and returns the offset of each chunk; raises ValueError if it is damaged."""
    index, size = opened.tail(layout.index_bytes)
    if len(index) != layout.index_bytes or crc32c.crc32c(index[:-CRC_BYTES]) != _crc(index[-CRC_BYTES:]):
        raise ValueError("the checksum of the shard's index does not match")
    entries = np.frombuffer(index[:-CRC_BYTES], "<u8").reshape(layout.chunks, 2)
    stored = entries[entries[:, 0] != EMPTY]
    if (stored[:, 1] != layout.chunk_bytes + CRC_BYTES).any() or (stored[:, 0] >= size).any():
        raise ValueError("the shard's index has a chunk with a wrong size or offset")
    return entries[:, 0].tolist()


def _read_runs(opened: OpenObject, runs: Sequence[tuple[int, Sequence[NDArray[np.uint8]]]]) -> None:
    """Reads runs of chunks, each chunk into its own array; checks a run while it is still in the CPU's cache."""
    sums = np.empty((sum(len(chunks) for _, chunks in runs), CRC_BYTES), np.uint8)
    free = iter(sums)
    wanted = [(offset, [part for chunk in chunks for part in (chunk, next(free))]) for offset, chunks in runs]
    at = 0
    for (_, chunks), count in zip(runs, opened.read_runs(wanted), strict=True):
        if count != len(chunks) * (chunks[0].size + CRC_BYTES):
            raise ValueError("the shard is too short")
        found = [crc32c.crc32c(chunk.data) for chunk in chunks]
        if found != sums[at : at + len(chunks)].view("<u4").ravel().tolist():
            raise ValueError("the checksum of a chunk does not match")
        at += len(chunks)


def _crc(stored: bytes) -> int:
    return int.from_bytes(stored, "little")
