"""Reads a complete cache: whole, by rows or by demo, in any process."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.cache import arrays
from cache_pipeline.cache.manifest import CameraEntry, Manifest
from cache_pipeline.cache.manifest_store import MANIFEST, read_manifest
from cache_pipeline.cache.metadata import check_metadata
from cache_pipeline.cache.store import Place, is_remote, store_at
from cache_pipeline.cache.store_protocol import Stamp, Store
from cache_pipeline.cache.table import DemoRows, first_rows, joined_spans, lengths, tasks
from cache_pipeline.errors import CacheError, CorruptCacheError, StaleCacheError, available
from cache_pipeline.files import Location, atomic_path

Rows = slice | NDArray[np.integer] | NDArray[np.bool_] | None


class _Identity(NamedTuple):
    """Identifies one manifest in one place: inode of the folder, None on an object store, and the manifest's stamp.

    The device number is left out, since it differs between machines that share a disk.
    """

    folder: int | None
    manifest: Stamp


def _identity(store: Store) -> _Identity | None:
    """Returns the identity of a manifest; None if there is none."""
    try:
        stamp = store.stamp(MANIFEST)
        folder = None if is_remote(store) else os.stat(store.place).st_ino
    except OSError:
        return None
    return None if stamp is None else _Identity(folder, stamp)


def _open(store: Store) -> tuple[_Identity, Manifest]:
    """Reads the manifest and checks its arrays; tries again if the cache was swapped meanwhile."""
    while True:
        before = _identity(store)
        try:
            manifest = read_manifest(store)
            for name in arrays.array_names(manifest):
                check_metadata(store, name, manifest)
        except CacheError:
            if before == _identity(store):
                raise
            continue
        if before is not None and before == _identity(store):
            return before, manifest


class FeatureCache:
    """A complete feature cache.

    Rows are those of the demo table: demo ``i`` lies at ``demos[i].row`` and has ``demos[i].length`` rows.
    ``rows=None`` returns all live rows, demo after demo in table order, without the dead rows of removed demos. In that
    result demo ``i`` begins at ``packed_starts[i]``.

    A cache may be extended while it is open; the open object keeps its demos and rows. After the cache is compacted,
    made anew or moved away, every read raises ``StaleCacheError``: each read checks, after the last byte, that the
    manifest is still the one that was opened.

    Safe to pickle and to use in forked and spawned workers: arrays are opened on first use in each process. A cache on
    an object store can be used in spawned workers only, and says so.

    >>> cache = FeatureCache("lift.zarr")                                  # doctest: +SKIP
    >>> cache.features("agentview_image").shape                            # doctest: +SKIP
    (5100, 512)

    Raises:
        NotACacheError, IncompleteCacheError, CorruptCacheError: what is wrong at ``path`` and how to repair it.
    """

    def __init__(self, path: Place) -> None:
        self.store = store_at(path)
        self._seen, self.manifest = _open(self.store)
        self._open: dict[str, arrays.StoredArray] = {}
        self._files: Path | None = None

    @property
    def path(self) -> Location:
        """The folder, or the URL as text."""
        return self.store.place

    @property
    def cameras(self) -> dict[str, CameraEntry]:
        """Camera → shapes, identity and number of views."""
        return self.manifest.cameras

    @property
    def demos(self) -> Sequence[DemoRows]:
        """The demo table, in the order of the source files."""
        return self.manifest.demos

    @property
    def masks(self) -> dict[str, tuple[int, ...]]:
        """Filter key → indices into ``demos`` of those of its demos that are in the cache."""
        return self.manifest.masks

    @property
    def absent(self) -> dict[str, tuple[str, ...]]:
        """Filter key → names of its demos that are not in the cache."""
        return self.manifest.absent

    @property
    def low_dim(self) -> dict[str, tuple[int, ...]]:
        """Low-dim obs key → shape of one row."""
        return self.manifest.low_dim

    @property
    def action_dim(self) -> int:
        """Width A of an action."""
        return self.manifest.action_dim

    @property
    def env_args(self) -> dict[str, Any] | None:
        """robomimic's description of the environment, where the source file has one."""
        return self.manifest.env_args

    @property
    def render_flags(self) -> dict[str, Any] | None:
        """Render flags of the source file that differ from the defaults."""
        return self.manifest.render_flags

    @property
    def fingerprint(self) -> str:
        """Digest of the contents of the cache, independent of its path and row layout."""
        return self.manifest.fingerprint

    @property
    def tasks(self) -> tuple[str | None, ...]:
        """The task of each demo in words; None where the dataset did not say it."""
        return tuple(tasks(self.demos))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(E,) frames of each demo."""
        return lengths(self.demos)

    @property
    def starts(self) -> NDArray[np.int64]:
        """(E,) first row of each demo."""
        return first_rows(self.demos)

    @property
    def packed_starts(self) -> NDArray[np.int64]:
        """(E,) first row of each demo in the result of ``rows=None``."""
        return np.cumsum(self.lengths) - self.lengths

    @property
    def live_rows(self) -> NDArray[np.int64]:
        """(N,) the rows that ``rows=None`` returns, in its order."""
        return np.arange(self.manifest.rows) + np.repeat(self.starts - self.packed_starts, self.lengths)

    def features(self, camera: str, rows: Rows = None, view: int = 0) -> NDArray[Any]:
        """Reads features at the cut, (n, D) or (n, D, h, w), in the stored dtype.

        Args:
            rows: None for all live rows, a slice of row numbers, an integer array in any order, or a boolean array
                with one value for each row of the cache, dead ones included.
            view: 0 is the clean one.
        """
        self._check_view(camera, view)
        return self._read(f"features/{camera}", rows, view)

    def views(self, camera: str, count: int | None = None) -> NDArray[Any]:
        """Reads all live rows of the first ``count`` views or all: (K, N, D) or (K, N, D, h, w), in the stored dtype.

        The result is filled in place: the fastest way to read a whole cache, without further memory.
        """
        self._check_view(camera, 0 if count is None else count - 1)
        spans = joined_spans(self.demos)
        with self._same_cache():
            stored = self._stored(f"features/{camera}")
            return stored.views(spans, self.cameras[camera].views if count is None else count)

    def array(self, name: str, rows: Rows = None) -> NDArray[Any]:
        """Reads ``actions`` (n, A), ``rewards`` (n,), ``dones`` (n,) or ``low_dim/<key>`` (n, …) in float32."""
        names = [name for name in self._names() if not name.startswith(("features/", "frame_digests/"))]
        if name not in names:
            raise CacheError(f"{self.path} has no array {name!r}; {available(names, name)}")
        return self._read(name, rows, None)

    def frame_digests(self, camera: str, rows: Rows = None) -> NDArray[np.uint8]:
        """Reads the blake2b digest of each frame, (n, 16) uint8."""
        if camera not in self.cameras:
            raise CacheError(f"{self.path} has no camera {camera!r}; {available(self.cameras, camera)}")
        return self._read(f"frame_digests/{camera}", rows, None)

    def encoder_file(self, camera: str) -> Path:
        """Returns the path of the frozen encoder's weights (safetensors) inside the cache for this camera."""
        if camera not in self.cameras:
            raise CacheError(f"{self.path} has no camera {camera!r}; {available(self.cameras, camera)}")
        with self._same_cache():
            name = self.manifest.encoders[camera]
            if isinstance(self.store.place, Path):
                return self.store.place / name
            return self._downloaded(name)

    def _downloaded(self, name: str) -> Path:
        """Copies an object to a temporary file, which lives as long as this object."""
        if self._files is None:
            self._files = Path(mkdtemp(prefix="cache_pipeline_"))
            weakref.finalize(self, shutil.rmtree, self._files, ignore_errors=True)
        file = self._files / Path(name).name
        if not file.exists():
            with atomic_path(file) as partial:
                partial.write_bytes(self.store.read(name))
        return file

    def nbytes(self, views: int | None = None) -> int:
        """Returns the bytes of all live features in memory, of the first ``views`` views or all."""
        itemsize = np.dtype(self.manifest.dtype).itemsize
        width = sum(
            int(np.prod(entry.feature_shape)) * (entry.views if views is None else min(views, entry.views))
            for entry in self.cameras.values()
        )
        return int(self.lengths.sum()) * width * itemsize

    def _names(self) -> list[str]:
        return arrays.array_names(self.manifest)

    def _check_view(self, camera: str, view: int) -> None:
        if camera not in self.cameras:
            raise CacheError(f"{self.path} has no camera {camera!r}; {available(self.cameras, camera)}")
        views = self.cameras[camera].views
        if not 0 <= view < views:
            raise CacheError(
                f"{self.path} has views 0 to {views - 1} of {camera}, not {view}; "
                f"add views with the extract-features command of this cache and --views {view + 1}"
            )

    def _stored(self, name: str) -> arrays.StoredArray:
        if name not in self._open:
            self._open[name] = arrays.StoredArray(self.store, name)
        return self._open[name]

    def _read(self, name: str, rows: Rows, view: int | None) -> NDArray[Any]:
        with self._same_cache():
            stored = self._stored(name)
            if rows is None:
                return stored.spans(joined_spans(self.demos), view)
            if isinstance(rows, slice):
                start, stop, step = rows.indices(self.manifest.n_rows)
                if step > 0:
                    return stored.spans([(start, max(start, stop))], view)[:: step if step > 1 else None]
                rows = np.arange(start, stop, step)
            return stored.gather(self._row_numbers(np.asarray(rows)), self.manifest.n_rows, view)

    def _row_numbers(self, rows: NDArray[Any]) -> NDArray[np.integer]:
        """Returns an integer array unchanged, and a boolean array as the row numbers that it selects."""
        if rows.dtype.kind in "iu" or rows.size == 0:
            return rows.astype(np.int64, copy=False)
        if rows.dtype.kind == "b" and rows.shape == (self.manifest.n_rows,):
            return np.flatnonzero(rows)
        if rows.dtype.kind == "b":
            raise CacheError(
                f"a boolean array selects from all {self.manifest.n_rows} rows of {self.path}, dead ones included; "
                f"this one has shape {rows.shape}; with one value per live row, pass live_rows[mask]"
            )
        raise CacheError(f"rows of {self.path} must be integers, a boolean array or a slice, not {rows.dtype}")

    @contextmanager
    def _same_cache(self) -> Iterator[None]:
        """Checks, after the reads inside the ``with`` block, that the cache is still the one that was opened."""
        try:
            yield
        except (CorruptCacheError, OSError):
            self._check_same()
            raise
        self._check_same()

    def _check_same(self) -> None:
        try:
            if self.store.stamp(MANIFEST) == self._seen.manifest:
                return
            seen, now = _open(self.store)
        except (OSError, CacheError) as error:
            raise self._stale(None, "it was moved away, or is being replaced,") from error
        extended = (
            seen.folder is not None and seen.folder == self._seen.folder
        )  # units that the new manifest no longer lists stay stored
        for name, output in self.manifest.units.items():
            if now.units.get(name, output if extended else None) != output:
                raise self._stale(now, "it was compacted or made anew")
        self._seen = seen

    def _stale(self, now: Manifest | None, what: str) -> StaleCacheError:
        field, was, wanted = "fingerprint", self.fingerprint, now.fingerprint if now is not None else None
        if was == wanted:
            assert now is not None
            field, was, wanted = "layout", f"{self.manifest.n_rows} rows", f"{now.n_rows} rows"
        command = "open it again; for training, run the same command again, with --resume if it saved steps"
        return StaleCacheError(field, was, wanted, f"{what} while {self.path} was open", command)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_files": None}

    def __repr__(self) -> str:
        cameras = json.dumps({name: [entry.views, *entry.feature_shape] for name, entry in self.cameras.items()})
        return f"FeatureCache({str(self.path)!r}, demos={len(self.demos)}, rows={int(self.lengths.sum())}, {cameras})"
