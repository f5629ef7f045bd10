"""Reading and writing uncompressed zarr shards directly: one system call a shard, checksums on the way.

zarr reads the same files; it takes a task and a copy for each chunk, which costs ten times the reading itself.
Layout of a shard as in the zarr v3 specification of ``sharding_indexed``: chunks (values, then their CRC-32C), at the
end an index of (offset, bytes) per chunk, then the index's CRC-32C.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import crc32c
import numpy as np
from numpy.typing import NDArray

from cache_pipeline.files import atomic_path

CRC_BYTES = 4
MAX_PIECES = 512  # below IOV_MAX of any system


class ShardLayout(NamedTuple):
    """Chunks of a shard, along the rows alone: ``chunks`` of ``chunk_bytes`` each, checksums left out."""

    chunks: int
    chunk_bytes: int

    @property
    def index_bytes(self) -> int:
        """Bytes of the index with its checksum."""
        return 16 * self.chunks + CRC_BYTES


def uncompressed_layout(metadata: dict[str, Any]) -> ShardLayout | None:
    """The layout of an array's shards when they can be read by :func:`read_chunks`, else None.

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
    itemsize = np.dtype(metadata["data_type"]).itemsize
    shard, chunk = metadata["chunk_grid"]["configuration"]["chunk_shape"], sharding["chunk_shape"]
    return ShardLayout(int(np.prod(shard)) // int(np.prod(chunk)), int(np.prod(chunk)) * itemsize)


def read_chunks(file: Path, layout: ShardLayout, first: int, out: NDArray[np.uint8]) -> None:
    """Reads chunks of one shard into ``out``, (n, chunk_bytes), from chunk ``first`` on.

    Raises:
        OSError: the file cannot be read.
        ValueError: a checksum, an offset or the file's size is not what was written.
    """
    descriptor = os.open(file, os.O_RDONLY)
    try:
        offsets = _read_index(descriptor, layout)[first : first + len(out)]
        start = 0
        for stop in range(1, len(out) + 1):
            follows = stop < len(out) and offsets[stop] == offsets[stop - 1] + layout.chunk_bytes + CRC_BYTES
            if not follows or stop - start == MAX_PIECES:
                _read_run(descriptor, int(offsets[start]), out[start:stop])
                start = stop
    finally:
        os.close(descriptor)


def write_shard(file: Path, layout: ShardLayout, values: NDArray[np.uint8]) -> None:
    """Writes a whole shard, (chunks, chunk_bytes), atomically and synced."""
    assert values.shape == (layout.chunks, layout.chunk_bytes), (values.shape, layout)
    size = layout.chunk_bytes + CRC_BYTES
    index = np.empty((layout.chunks, 2), "<u8")
    index[:, 0], index[:, 1] = np.arange(layout.chunks) * size, size
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as partial, partial.open("wb") as shard:
        for chunk in values:
            shard.write(chunk)
            shard.write(crc32c.crc32c(chunk).to_bytes(CRC_BYTES, "little"))
        shard.write(index.tobytes())
        shard.write(crc32c.crc32c(index.tobytes()).to_bytes(CRC_BYTES, "little"))


def _read_index(descriptor: int, layout: ShardLayout) -> NDArray[np.int64]:
    size = os.fstat(descriptor).st_size
    index = os.pread(descriptor, layout.index_bytes, max(0, size - layout.index_bytes))
    if len(index) != layout.index_bytes or crc32c.crc32c(index[:-CRC_BYTES]) != _crc(index[-CRC_BYTES:]):
        raise ValueError("the checksum of the shard's index does not fit")
    entries = np.frombuffer(index[:-CRC_BYTES], "<u8").reshape(layout.chunks, 2)
    if (entries[:, 1] != layout.chunk_bytes + CRC_BYTES).any():
        raise ValueError("the shard's index names a chunk of another size")
    return entries[:, 0].astype(np.int64)


def _read_run(descriptor: int, offset: int, out: NDArray[np.uint8]) -> None:
    checksums = np.empty((len(out), CRC_BYTES), np.uint8)
    pieces: Sequence[Any] = [part for pair in zip(out, checksums, strict=True) for part in pair]
    if os.preadv(descriptor, pieces, offset) != out.size + checksums.size:
        raise ValueError("the shard ends too early")
    for values, stored in zip(out, checksums, strict=True):
        if crc32c.crc32c(values) != _crc(stored.tobytes()):
            raise ValueError("the checksum of a chunk does not fit")


def _crc(stored: bytes) -> int:
    return int.from_bytes(stored, "little")
