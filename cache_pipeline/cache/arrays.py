"""The zarr v3 arrays of a cache: their names, their layout, and how their shards are read and written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.metadata import ArrayV3Metadata

from cache_pipeline.cache.layout import Unit
from cache_pipeline.cache.manifest import Manifest
from cache_pipeline.cache.shards import open_shard, uncompressed_layout, write_shard
from cache_pipeline.cache.store import Place, exists, is_remote, store_at
from cache_pipeline.cache.store_protocol import Stamp
from cache_pipeline.errors import CorruptCacheError
from cache_pipeline.files import DIGEST_BYTES, sync_file, sync_folder

READ_THREADS = max(1, min(8, os.cpu_count() or 1))
THREADED_BYTES = 2 << 20  # smaller reads run in the calling thread, which is faster than starting threads
PIECE_BYTES = 4 << 20  # bytes that one thread reads per call
LONG_RUN = 16  # mean rows per run from which each run is read directly into the output
Item = TypeVar("Item")
DECODE_ERRORS = (ValueError, RuntimeError, TypeError, KeyError, OSError)
"""Exceptions that zarr and its codecs raise for damaged bytes."""


class ArraySpec(NamedTuple):
    """Values that determine the metadata of one array.

    Attributes:
        dtype: of the stored values.
        row_shape: shape of one row.
        views: length of the leading axis; None for an array without one.
    """

    dtype: str
    row_shape: tuple[int, ...]
    views: int | None

    @property
    def fill(self) -> float | int:
        """The fill value: NaN for floats, which marks a row that was never written; 0 for integers."""
        return float("nan") if self.dtype.startswith("float") else 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of one view."""
        return int(np.prod(self.row_shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def array_specs(manifest: Manifest) -> dict[str, ArraySpec]:
    """Returns the spec of every array of the cache, by its path inside the cache."""
    specs = {}
    for camera, entry in manifest.cameras.items():
        specs[f"features/{camera}"] = ArraySpec(manifest.dtype, entry.feature_shape, entry.views)
        specs[f"frame_digests/{camera}"] = ArraySpec("uint8", (DIGEST_BYTES,), None)
    for key, shape in manifest.low_dim.items():
        specs[f"low_dim/{key}"] = ArraySpec("float32", shape, None)
    specs["actions"] = ArraySpec("float32", (manifest.action_dim,), None)
    specs["rewards"] = specs["dones"] = ArraySpec("float32", (), None)
    return specs


def array_names(manifest: Manifest) -> list[str]:
    """Returns the paths of all arrays inside the cache."""
    return list(array_specs(manifest))


def unit_arrays(manifest: Manifest, unit: Unit) -> list[str]:
    """Returns the arrays of which a unit writes one shard, in the order in which its digest covers them."""
    if unit.kind == "features":
        return [f"features/{unit.key}"]
    if unit.kind == "frames":
        return [f"frame_digests/{unit.key}"]
    if unit.kind == "low_dim":
        return [f"low_dim/{unit.key}"]
    if unit.kind == "steps":
        return ["actions", "dones", "rewards"]
    return sorted(name for name in array_specs(manifest) if not name.startswith(("features/", "frame_digests/")))


MEND = "run the extract-features command of this cache again; it writes missing or damaged parts again"


class _Piece(NamedTuple):
    """Rows of one shard, starting at ``row``, to read into ``out``."""

    view: int
    block: int
    row: int
    out: NDArray[Any]


class StoredArray:
    """One array of a cache, opened in this process. Reading raises ``CorruptCacheError``; a missing file is never read
    as fill values.

    Args:
        place: the cache.
        name: the array inside it, such as ``features/agentview_image``.
    """

    def __init__(self, place: Place, name: str, *, read_only: bool = True) -> None:
        self.store, self.name = store_at(place), name
        self._read_only = read_only
        try:
            metadata = json.loads(self.store.read(f"{name}/zarr.json"))
            self._has_views = name.startswith("features/")
            rows_at = 1 if self._has_views else 0
            self.shard_rows = int(metadata["chunk_grid"]["configuration"]["chunk_shape"][rows_at])
            self.dtype = np.dtype(metadata["data_type"])
            self.row_shape = tuple(int(side) for side in metadata["shape"][rows_at + 1 :])
            self._layout = uncompressed_layout(metadata)
        except DECODE_ERRORS as error:
            raise CorruptCacheError(f"{self} cannot be opened ({error}); {MEND}") from error
        self.fill = float("nan") if self.dtype.kind == "f" else 0

    def spans(self, spans: Sequence[tuple[int, int]], view: int | None = None) -> NDArray[Any]:
        """Reads the rows of several spans (start, stop) and joins them, (n, …)."""
        out = np.empty((sum(stop - start for start, stop in spans), *self.row_shape), self.dtype)
        _in_threads(self._read_piece, list(self._pieces(_merged(spans), view or 0, out)), out.nbytes)
        return out

    def views(self, spans: Sequence[tuple[int, int]], count: int) -> NDArray[Any]:
        """Reads the rows of several spans of the first ``count`` views, (count, n, …)."""
        out = np.empty((count, sum(stop - start for start, stop in spans), *self.row_shape), self.dtype)
        merged = _merged(spans)
        pieces = [piece for view in range(count) for piece in self._pieces(merged, view, out[view])]
        _in_threads(self._read_piece, pieces, out.nbytes)
        return out

    def gather(self, rows: NDArray[np.integer], n_rows: int, view: int | None = None) -> NDArray[Any]:
        """Reads rows in the requested order, (n, …), and each chunk once."""
        if rows.size == 0:
            return np.empty((*rows.shape, *self.row_shape), self.dtype)
        ascending = rows.ndim == 1 and bool((np.diff(rows) > 0).all())
        unique, inverse = (rows, None) if ascending else np.unique(rows, return_inverse=True)
        if unique[0] < 0 or unique[-1] >= n_rows:
            raise IndexError(f"rows must lie in [0, {n_rows}), they lie in [{unique[0]}, {unique[-1]}]")
        found = np.empty((len(unique), *self.row_shape), self.dtype)
        cuts = np.flatnonzero(np.diff(unique) > 1) + 1
        if len(cuts) * LONG_RUN < len(unique):
            firsts, lasts = unique[[0, *cuts]], unique[[*(cuts - 1), -1]]
            spans = list(zip(firsts.tolist(), (lasts + 1).tolist(), strict=True))
            _in_threads(self._read_piece, list(self._pieces(spans, view or 0, found)), found.nbytes)
        else:
            self._read_rows(unique, view or 0, found)
        return found if inverse is None else found[inverse.reshape(rows.shape)]

    def block(self, block: int, view: int | None = None) -> NDArray[Any]:
        """Reads a whole shard with its dead rows, (shard_rows, …)."""
        return self.spans([(block * self.shard_rows, (block + 1) * self.shard_rows)], view)

    def stamp(self, block: int, view: int | None = None) -> Stamp | None:
        """Returns the stamp of a shard, None if it is missing; its contents are not checked."""
        return self.store.stamp(self._shard(block, view or 0))

    def write_block(
        self, block: int, values: NDArray[Any], view: int | None = None, after: Stamp | None = None
    ) -> None:
        """Writes one whole shard, (shard_rows, …), and waits until it is safe.

        Args:
            after: the shard's :meth:`stamp` when it was read.

        Raises:
            ChangedError: on an object store, another process has written the shard meanwhile.
        """
        assert values.shape == (self.shard_rows, *self.row_shape), (values.shape, self.shard_rows, self.row_shape)
        if self._layout is not None:
            chunks = np.ascontiguousarray(values).view(np.uint8).reshape(self._layout.chunks, -1)
            return write_shard(self.store, self._shard(block, view or 0), self._layout, chunks, after)
        rows = slice(block * self.shard_rows, (block + 1) * self.shard_rows)
        self._array[(view or 0, rows) if self._has_views else rows] = values
        if not is_remote(self.store):
            file = os.path.join(self.store.place, self._shard(block, view or 0))
            sync_file(file)
            sync_folder(os.path.dirname(file))
        return None

    def _pieces(self, spans: Sequence[tuple[int, int]], view: int, out: NDArray[Any]) -> Iterator[_Piece]:
        """Splits spans at shard bounds, then into pieces that one thread reads per call."""
        chunk_rows = self.shard_rows // self._layout.chunks if self._layout else self.shard_rows
        chunks_at_once = max(1, PIECE_BYTES // self._layout.chunk_bytes) if self._layout else 1
        step = min(self.shard_rows, chunk_rows * chunks_at_once)
        at = 0
        for start, stop in spans:
            while start < stop:
                block, row = divmod(start, self.shard_rows)
                count = min(stop - start, step - row % step, self.shard_rows - row)
                yield _Piece(view, block, row, out[at : at + count])
                start, at = start + count, at + count

    def _read_piece(self, piece: _Piece) -> None:
        view, block, row, out = piece
        with self._damage_as_error(block, view):
            if self._layout is None:
                first = block * self.shard_rows + row
                out[...] = self._select(slice(first, first + len(out)), view)
            else:
                with open_shard(self.store, self._shard(block, view), self._layout) as shard:
                    shard.read_span(row, _row_bytes(out))

    def _read_rows(self, rows: NDArray[np.integer], view: int, out: NDArray[Any]) -> None:
        """Reads scattered rows in ascending order into ``out``, shard by shard."""
        blocks = rows // self.shard_rows
        cuts = (np.flatnonzero(np.diff(blocks)) + 1).tolist()

        def read(part: slice) -> None:
            block = int(blocks[part.start])
            with self._damage_as_error(block, view):
                if self._layout is None:
                    out[part] = self._select(rows[part], view)
                else:
                    with open_shard(self.store, self._shard(block, view), self._layout) as shard:
                        shard.read_rows(rows[part] - block * self.shard_rows, _row_bytes(out[part]))

        _in_threads(read, list(map(slice, [0, *cuts], [*cuts, len(rows)])), out.nbytes)

    def _select(self, rows: Any, view: int) -> NDArray[Any]:
        selection = (view, rows) if self._has_views else (rows,)
        if isinstance(rows, slice):
            return np.asarray(self._array[selection])
        return np.asarray(self._array.oindex[selection])

    @cached_property
    def _array(self) -> zarr.Array[ArrayV3Metadata]:
        """The zarr array, opened on first use; only compressed arrays need it."""
        store, path = self.store.zarr(self.name, read_only=self._read_only)
        array = zarr.open_array(store, path=path, mode="r" if self._read_only else "r+")
        # Chunks of fill values are stored too, so a missing shard file means that the shard was never written.
        config: Any = {"order": "C", "write_empty_chunks": True}
        metadata = cast(ArrayV3Metadata, array.metadata)
        return zarr.Array(zarr.AsyncArray(metadata, array.async_array.store_path, config))

    @contextmanager
    def _damage_as_error(self, block: int, view: int) -> Iterator[None]:
        missing = f"{self.store.place}/{self._shard(block, view)} is missing; {MEND}"
        if self._layout is None and not exists(self.store, self._shard(block, view)):
            raise CorruptCacheError(missing)  # zarr reads it as fill values
        try:
            yield
        except FileNotFoundError as error:
            raise CorruptCacheError(missing) from error
        except (*DECODE_ERRORS, zarr.errors.BaseZarrError) as error:
            raise CorruptCacheError(
                f"{self} is damaged ({error}); "
                f"find the damaged units with verify {self.store.place} --integrity, then {MEND}"
            ) from error

    def _shard(self, block: int, view: int) -> str:
        """Returns the name of a shard inside the cache."""
        lead = (view,) if self._has_views else ()
        return "/".join([self.name, "c", *map(str, (*lead, block, *(0 for _ in self.row_shape)))])

    def __str__(self) -> str:
        return f"{self.store.place}/{self.name}"


def _merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Joins adjacent spans and drops empty ones."""
    merged: list[tuple[int, int]] = []
    for start, stop in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        elif stop > start:
            merged.append((start, stop))
    return merged


def _row_bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Views (n, …) as uint8 (n, bytes of a row), without a copy."""
    return values.reshape(len(values), -1).view(np.uint8)


def _in_threads(read: Callable[[Item], None], items: Sequence[Item], size: int) -> None:
    """Reads items of ``size`` bytes in total, in threads if they are large enough."""
    if len(items) < 2 or size < THREADED_BYTES:
        for item in items:
            read(item)
        return
    with ThreadPoolExecutor(min(READ_THREADS, len(items))) as pool:
        list(pool.map(read, items))
