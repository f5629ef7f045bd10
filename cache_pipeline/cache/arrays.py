"""The zarr v3 arrays of a cache: what they are called, how they are laid out, how shards are written and read."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.core.metadata import ArrayV3Metadata
from zarr.storage import LocalStore, MemoryStore

from cache_pipeline.cache.layout import Unit, align_up, choose_chunk_rows
from cache_pipeline.cache.manifest import Manifest
from cache_pipeline.cache.shards import read_chunks, uncompressed_layout, write_shard
from cache_pipeline.errors import CorruptCacheError
from cache_pipeline.files import DIGEST_BYTES, atomic_path

READ_THREADS = 4
GROUP = {"attributes": {}, "zarr_format": 3, "node_type": "group"}
DECODE_ERRORS = (ValueError, RuntimeError, TypeError, KeyError, OSError)
"""What zarr and its codecs raise for bytes that are not what was written."""


class ArraySpec(NamedTuple):
    """What decides the metadata of one array.

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
        """NaN shows a row that was never written; integers have no such value."""
        return float("nan") if self.dtype.startswith("float") else 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of one view."""
        return int(np.prod(self.row_shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def array_specs(manifest: Manifest) -> dict[str, ArraySpec]:
    """Path inside the cache → spec, for every array of the cache."""
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
    """Paths of all arrays inside the cache."""
    return list(array_specs(manifest))


def unit_arrays(manifest: Manifest, unit: Unit) -> list[str]:
    """The arrays of which a unit writes one shard, in the order in which its digest takes them."""
    if unit.kind == "features":
        return [f"features/{unit.camera}"]
    if unit.kind == "frames":
        return [f"frame_digests/{unit.camera}"]
    return sorted(name for name in array_specs(manifest) if not name.startswith(("features/", "frame_digests/")))


def array_metadata(spec: ArraySpec, n_rows: int, shard_rows: int) -> bytes:
    """The ``zarr.json`` of one array: a pure function, so that it can be compared and written again."""
    rows = max(align_up(n_rows, shard_rows), shard_rows)
    lead = () if spec.views is None else (1,)
    chunk_rows = choose_chunk_rows(spec.row_bytes, shard_rows)
    names = [*(["view"] if lead else []), "row", *("feature", "h", "w")[: len(spec.row_shape)]]
    stored: dict[str, Buffer] = {}
    zarr.create_array(
        MemoryStore(stored),
        shape=(*([spec.views] if spec.views is not None else []), rows, *spec.row_shape),
        shards=(*lead, shard_rows, *spec.row_shape),
        chunks=(*lead, chunk_rows, *spec.row_shape),
        dtype=spec.dtype,
        compressors=[Crc32cCodec()],
        fill_value=spec.fill,
        dimension_names=names,
        zarr_format=3,
    )
    return stored["zarr.json"].to_bytes()


def metadata_files(manifest: Manifest) -> dict[str, bytes]:
    """Path → bytes of every ``zarr.json`` of the cache, groups included."""
    group = json.dumps(GROUP, indent=2).encode()
    files = {"zarr.json": group}
    for name, spec in array_specs(manifest).items():
        for parent in Path(name).parents[:-1]:
            files[f"{parent}/zarr.json"] = group
        files[f"{name}/zarr.json"] = array_metadata(spec, manifest.n_rows, manifest.shard_rows)
    return files


def write_metadata(path: Path, files: dict[str, bytes]) -> None:
    """Writes each metadata file that is missing or differs; shards are left alone."""
    for name, content in files.items():
        file = path / name
        if file.is_file() and file.read_bytes() == content:
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as partial:
            partial.write_bytes(content)


def check_metadata(path: Path, name: str, manifest: Manifest) -> None:
    """Refuses an array whose ``zarr.json`` does not hold what the manifest tells."""
    file = path / name / "zarr.json"
    spec, lead = array_specs(manifest)[name], array_specs(manifest)[name].views
    try:
        stored = json.loads(file.read_bytes())
        shape, shard = stored["shape"], stored["chunk_grid"]["configuration"]["chunk_shape"]
        dtype = stored["data_type"]
        rows_at = 0 if lead is None else 1
        fits = (
            dtype == spec.dtype
            and shape[rows_at + 1 :] == list(spec.row_shape)
            and shape[rows_at] >= manifest.n_rows
            and shard[rows_at] == manifest.shard_rows
            and (lead is None or shape[0] >= lead)
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CorruptCacheError(f"{file} is missing or damaged ({error}); {MEND}") from error
    if not fits:
        raise CorruptCacheError(f"{file} tells another shape or type than the manifest; {MEND}")


MEND = "run the extract-features command of this cache again: it makes anew what is missing or damaged"


def shard_file(path: Path, name: str, spec: ArraySpec, view: int, block: int) -> Path:
    """Where a shard lies."""
    lead = () if spec.views is None else (view,)
    return path.joinpath(name, "c", *map(str, (*lead, block, *(0 for _ in spec.row_shape))))


class StoredArray:
    """One array of a cache, opened in this process. Reading raises ``CorruptCacheError``, never returns fill values.

    Args:
        path: the cache.
        name: the array inside it, such as ``features/agentview_image``.
    """

    def __init__(self, path: Path, name: str, *, read_only: bool = True) -> None:
        self.path, self.name = path, name
        try:
            store = LocalStore(path / name, read_only=read_only)
            array = zarr.open_array(store, mode="r" if read_only else "r+")
        except (*DECODE_ERRORS, zarr.errors.BaseZarrError) as error:
            raise CorruptCacheError(f"{path / name} cannot be opened ({error}); {MEND}") from error
        # A chunk that equals the fill value is stored too: a shard that is not there was never written.
        config: Any = {"order": "C", "write_empty_chunks": True}
        metadata = cast(ArrayV3Metadata, array.metadata)
        self._array = zarr.Array(zarr.AsyncArray(metadata, array.async_array.store_path, config))
        self._has_views = (metadata.dimension_names or ("",))[0] == "view"
        self.shard_rows = int((self._array.shards or self._array.chunks)[1 if self._has_views else 0])
        self.dtype = self._array.dtype
        self.row_shape = tuple(self._array.shape[2 if self._has_views else 1 :])
        self.fill = float("nan") if self.dtype.kind == "f" else 0
        self._layout = uncompressed_layout(metadata.to_dict())

    def spans(self, spans: Sequence[tuple[int, int]], view: int | None = None) -> NDArray[Any]:
        """Rows of several spans, one after another, (n, …)."""
        merged: list[tuple[int, int]] = []
        for start, stop in spans:
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], stop)
            elif stop > start:
                merged.append((start, stop))
        if len(merged) == 1:
            return self._span(*merged[0], view)
        out = np.empty((sum(stop - start for start, stop in merged), *self.row_shape), self.dtype)
        at = 0
        for start, stop in merged:
            out[at : at + stop - start] = self._span(start, stop, view)
            at += stop - start
        return out

    def gather(self, rows: NDArray[np.integer], n_rows: int, view: int | None = None) -> NDArray[Any]:
        """Rows in the order asked for, (n, …); each chunk that holds one is read once."""
        if rows.size == 0:
            return np.empty((*rows.shape, *self.row_shape), self.dtype)
        unique, inverse = np.unique(rows, return_inverse=True)
        if unique[0] < 0 or unique[-1] >= n_rows:
            raise IndexError(f"rows must lie in [0, {n_rows}), they lie in [{unique[0]}, {unique[-1]}]")
        if self._layout is not None:
            found = self._gather_uncompressed(unique, view or 0)
        else:
            self._check_shards(set((unique // self.shard_rows).tolist()), view or 0)
            found = self._select(unique, view)
        return found[inverse.reshape(rows.shape)]

    def block(self, block: int, view: int | None = None) -> NDArray[Any]:
        """A whole shard with its dead rows, (shard_rows, …)."""
        return self._span(block * self.shard_rows, (block + 1) * self.shard_rows, view)

    def write_block(self, block: int, values: NDArray[Any], view: int | None = None) -> None:
        """Writes one whole shard, (shard_rows, …), and syncs it to the disk."""
        assert values.shape == (self.shard_rows, *self.row_shape), (values.shape, self.shard_rows, self.row_shape)
        if self._layout is not None:
            chunks = np.ascontiguousarray(values).view(np.uint8).reshape(self._layout)
            return write_shard(self._shard_file(block, view or 0), self._layout, chunks)
        rows = slice(block * self.shard_rows, (block + 1) * self.shard_rows)
        self._array[(view or 0, rows) if self._has_views else rows] = values
        _sync_file(self._shard_file(block, view or 0))
        return None

    def _span(self, start: int, stop: int, view: int | None) -> NDArray[Any]:
        if stop <= start:
            return np.empty((0, *self.row_shape), self.dtype)
        if self._layout is not None:
            return self._read_uncompressed(start, stop, view or 0)
        self._check_shards(range(start // self.shard_rows, (stop - 1) // self.shard_rows + 1), view or 0)
        return self._select(slice(start, stop), view)

    def _read_uncompressed(self, start: int, stop: int, view: int) -> NDArray[Any]:
        """Rows [start, stop), and around them those that share their chunks, read shard by shard in threads."""
        layout = self._layout
        assert layout is not None
        chunks = layout.chunks
        rows = self.shard_rows // chunks
        first, last = start // rows, -(-stop // rows)
        out = np.empty((last - first, layout.chunk_bytes), np.uint8)

        def read(block: int) -> None:
            low, high = max(first, block * chunks), min(last, (block + 1) * chunks)
            file = self._shard_file(block, view)
            try:
                read_chunks(file, layout, low - block * chunks, out[low - first : high - first])
            except FileNotFoundError as error:
                raise CorruptCacheError(f"{file} is missing; {MEND}") from error
            except (OSError, ValueError) as error:
                raise self._damaged(error) from error

        blocks = range(first // chunks, (last - 1) // chunks + 1)
        if len(blocks) == 1:
            read(blocks[0])
        else:
            with ThreadPoolExecutor(min(READ_THREADS, len(blocks))) as pool:
                list(pool.map(read, blocks))
        values = out.reshape(-1).view(self.dtype).reshape(-1, *self.row_shape)
        return values[start - first * rows : stop - first * rows]

    def _gather_uncompressed(self, unique: NDArray[np.integer], view: int) -> NDArray[Any]:
        """Sorted rows: each chunk that holds one is read once."""
        assert self._layout is not None
        rows = self.shard_rows // self._layout.chunks
        out = np.empty((len(unique), *self.row_shape), self.dtype)
        cuts = np.flatnonzero(np.diff(unique // rows) > 1) + 1
        for part in np.split(np.arange(len(unique)), cuts):
            wanted = unique[part]
            out[part] = self._read_uncompressed(int(wanted[0]), int(wanted[-1]) + 1, view)[wanted - wanted[0]]
        return out

    def _select(self, rows: Any, view: int | None) -> NDArray[Any]:
        selection = (view or 0, rows) if self._has_views else (rows,)
        try:
            if isinstance(rows, slice):
                return np.asarray(self._array[selection])
            return np.asarray(self._array.oindex[selection])
        except DECODE_ERRORS as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> CorruptCacheError:
        return CorruptCacheError(
            f"{self.path / self.name} holds bytes that are not what was written ({error}); "
            f"find the damaged units with verify {self.path} --integrity, then {MEND}"
        )

    def _check_shards(self, blocks: Any, view: int) -> None:
        for block in blocks:
            file = self._shard_file(block, view)
            if not file.is_file():
                raise CorruptCacheError(f"{file} is missing; {MEND}")

    def _shard_file(self, block: int, view: int) -> Path:
        lead = (view,) if self._has_views else ()
        return self.path.joinpath(self.name, "c", *map(str, (*lead, block, *(0 for _ in self.row_shape))))


def _sync_file(file: Path) -> None:
    for path, flags in ((file, os.O_RDWR), (file.parent, os.O_RDONLY)):
        descriptor = os.open(path, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
