"""Makes units: reads the frames of a job, encodes them, and writes whole shards with their records.

The three stages run in parallel. A unit has the same bytes whoever makes it, so making one twice does no harm.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray

from cache_pipeline.cache import arrays
from cache_pipeline.cache.layout import Segment, Unit
from cache_pipeline.cache.ledger import LedgerRecord, MadeWith, RecordedSegment, write_record
from cache_pipeline.cache.manifest import Manifest
from cache_pipeline.cache.manifest_store import check_claim
from cache_pipeline.cache.store_protocol import Stamp, Store
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.encoders.device import device_name
from cache_pipeline.encoders.frozen import FrozenEncoder
from cache_pipeline.encoders.view_spec import ViewSpec
from cache_pipeline.encoders.views import ViewParameters, view_parameters
from cache_pipeline.errors import ChangedError, CorruptCacheError, DatasetError, EncoderError
from cache_pipeline.extract.encode import BatchEncoder, not_finite_row
from cache_pipeline.extract.matching import array_digest, frame_digests
from cache_pipeline.extract.stages import ReadAhead, WriteBehind
from cache_pipeline.extract.units import Job, read_rows, rows_digest
from cache_pipeline.files import digest


class Report(Protocol):
    """What a worker tells whoever started it. Its methods are called from several threads."""

    def advance(self, images: int) -> None:
        """Images were encoded; negative if they must be encoded again."""

    def done(self, job: Job) -> None:
        """All units of a job are written and recorded."""

    def failed(self, job: Job, error: Exception) -> None:
        """A unit of a job could not be made. To raise the error ends the worker; else it goes on with other jobs."""


class Ran(NamedTuple):
    """Seconds that each stage took, and the batch size at the end."""

    read_s: float
    encode_s: float
    write_s: float
    batch_size: int


class _Read(NamedTuple):
    """A job and its data: concatenated frames of all segments, or low-dim rows. ``recorded`` is empty if that failed.

    ``left`` holds the units that are not written yet.
    """

    job: Job
    frames: NDArray[np.uint8]
    digests: NDArray[np.uint8]
    rows: dict[str, NDArray]
    recorded: dict[Unit, tuple[RecordedSegment, ...]]
    left: set[Unit]


class _Write(NamedTuple):
    """One unit to write: array name → live rows."""

    unit: Unit
    read: _Read
    values: dict[str, NDArray]
    seconds: float


NONE = np.zeros((0, 16), np.uint8)
ATTEMPTS = 3
"""Of writing a shard that another process writes at the same time, on an object store."""


def _write_block(
    stored: arrays.StoredArray, unit: Unit, rows: NDArray[np.int64], values: NDArray[Any], claim: Stamp | None
) -> NDArray[Any]:
    """Writes a shard, unless its ``rows`` equal ``values`` already: its other rows may be in use. Returns the shard.

    Args:
        claim: the stamp of the claimed manifest. A stored shard is only replaced while it stands, which is looked up
            after the shard's own stamp, so that a writer who was overtaken meanwhile replaces nothing.

    Raises:
        ChangedError: another process writes other values there.
    """
    for attempt in range(ATTEMPTS):
        stamp = stored.stamp(unit.block, unit.view)
        block = _equal_block(stored, unit, rows, values) if stamp is not None else None
        if block is not None:
            return block
        if stamp is not None:
            check_claim(stored.store, claim)
        block = np.full((stored.shard_rows, *stored.row_shape), stored.fill, stored.dtype)
        block[rows] = values
        try:
            stored.write_block(unit.block, block, unit.view, stamp)
            return block
        except ChangedError:
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


def _equal_block(
    stored: arrays.StoredArray, unit: Unit, rows: NDArray[np.int64], values: NDArray[Any]
) -> NDArray[Any] | None:
    """Returns the stored shard if its ``rows`` equal ``values``, else None."""
    try:
        block = stored.block(unit.block, unit.view)
    except CorruptCacheError:
        return None
    return block if block[rows].tobytes() == values.astype(stored.dtype, copy=False).tobytes() else None


class Worker:
    """Runs the three stages over jobs.

    Args:
        store: the cache.
        claim: on an object store, the stamp of the claimed manifest.
        manifest: its target manifest.
        dataset: the source of frames and rows.
        encoders: camera → its encoder.
        report: what to tell.
    """

    def __init__(
        self,
        store: Store,
        claim: Stamp | None,
        manifest: Manifest,
        dataset: Dataset,
        encoders: Mapping[str, FrozenEncoder],
        report: Report,
    ) -> None:
        self._store, self._claim, self._manifest = store, claim, manifest
        self._dataset, self._encoders = dataset, encoders
        self._report, self._encode_s = report, 0.0
        self._batches = BatchEncoder(manifest.batch_size, manifest.dtype)
        self._stored: dict[str, arrays.StoredArray] = {}
        self._lock = threading.Lock()

    def run(self, jobs: Iterable[Job]) -> Ran:
        """Makes the units of all jobs; an iterator of jobs may wait for the next one."""
        self._encode_s = 0.0
        for name in arrays.array_names(self._manifest):
            self._stored[name] = arrays.StoredArray(self._store, name, read_only=False)
        reader, writer = ReadAhead(self._read, jobs), WriteBehind(self._write)
        with writer, reader as results:
            self._encode(results, writer)
        return Ran(reader.seconds, self._encode_s, writer.seconds, self._batches.batch_size)

    def _read(self, job: Job) -> _Read:
        try:
            return self._read_frames(job) if job.camera else self._read_rows(job)
        except Exception as error:
            self._report.failed(job, error)
            return _Read(job, NONE, NONE, {}, {}, set())

    def _read_rows(self, job: Job) -> _Read:
        pieces = [read_rows(self._dataset, segment) for segment in job.segments]
        rows = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        recorded = {}
        for unit in job.units:
            names = arrays.unit_arrays(self._manifest, unit)
            digests = [rows_digest({name: piece[name] for name in names}) for piece in pieces]
            recorded[unit] = tuple(map(self._record, job.segments, digests))
        return _Read(job, NONE, NONE, rows, recorded, set(job.units))

    def _read_frames(self, job: Job) -> _Read:
        lengths = [segment.stop - segment.start for segment in job.segments]
        spans = [(s.demo, s.offset, s.offset + count) for s, count in zip(job.segments, lengths, strict=True)]
        frames = self._dataset.gather(job.camera, spans)
        frame_hashes = frame_digests(frames)
        parts = np.split(frame_hashes, np.cumsum(lengths)[:-1])
        segments = tuple(map(self._record, job.segments, map(array_digest, parts)))
        self._check_unchanged(job, segments)
        return _Read(job, frames, frame_hashes, {}, dict.fromkeys(job.units, segments), set(job.units))

    def _record(self, segment: Segment, content: str) -> RecordedSegment:
        demo = self._manifest.demos[segment.demo]
        source = self._manifest.files[demo.file]
        rows = (segment.offset, segment.start, segment.stop)
        return RecordedSegment(*source[:3], demo.name, *rows, demo.view_key, content)

    def _check_unchanged(self, job: Job, recorded: tuple[RecordedSegment, ...]) -> None:
        for segment in recorded:
            if job.known.get(segment.start, segment.digest) != segment.digest:
                raise DatasetError(
                    f"{segment.file}: {segment.demo}: frames of {job.camera} have changed although the file's size and "
                    "time have not; run the same command again with --deep"
                )

    def _encode(self, results: Iterator[_Read], writer: WriteBehind[_Write]) -> None:
        for read in results:
            for unit in read.recorded:
                began = time.perf_counter()
                try:
                    values = self._values(read, unit)
                except Exception as error:
                    self._report.failed(read.job, error)
                    break
                seconds = time.perf_counter() - began
                self._encode_s += seconds if unit.kind == "features" else 0.0
                writer.put(_Write(unit, read, values, seconds))

    def _values(self, read: _Read, unit: Unit) -> dict[str, NDArray]:
        """Returns array name → rows of one unit."""
        if unit.kind == "frames":
            return {f"frame_digests/{unit.key}": read.digests}
        if unit.kind != "features":
            return read.rows
        encoder, views = self._encoders[unit.key], self._views(read, unit)
        return {f"features/{unit.key}": self._batches(encoder, read.frames, views, self._report.advance)}

    def _views(self, read: _Read, unit: Unit) -> list[ViewParameters] | None:
        if unit.view == 0:
            return None
        spec = ViewSpec.from_json(self._manifest.cameras[unit.key].view_spec or {})
        views = []
        for segment in read.recorded[unit]:
            drawn = view_parameters(spec, segment.view_key, unit.key, unit.view)
            views += [drawn] * (segment.stop - segment.start)
        return views

    def _check_finite(self, features: NDArray, item: _Write) -> None:
        row, unit = not_finite_row(features), item.unit
        if row is None:
            return
        for segment in item.read.recorded[unit]:
            if row < segment.stop - segment.start:
                raise EncoderError(
                    f"{segment.file}: {segment.demo}: the feature of {unit.key} frame {segment.offset + row} is "
                    f"not finite in {self._manifest.dtype}; try --store-dtype float32 and --precision fp32"
                )
            row -= segment.stop - segment.start

    def _write(self, item: _Write) -> None:
        try:
            self._write_unit(item)
        except Exception as error:
            self._report.failed(item.read.job, error)
            return
        with self._lock:
            item.read.left.discard(item.unit)
            done = not item.read.left
        if done:
            self._report.done(item.read.job)

    def _write_unit(self, item: _Write) -> None:
        unit, hashes, size = item.unit, [], self._manifest.shard_rows
        if unit.kind == "features":
            self._check_finite(item.values[f"features/{unit.key}"], item)
        rows = np.concatenate([np.arange(segment.start, segment.stop) for segment in item.read.job.segments])
        for name in arrays.unit_arrays(self._manifest, unit):
            stored, values = self._stored[name], item.values[name]
            assert len(values) == len(rows), (unit, len(rows), len(values))
            hashes.append(_write_block(stored, unit, rows % size, values, self._claim).tobytes())
        base = unit.block * size
        record = LedgerRecord(
            unit.name,
            (base, base + size),
            item.read.recorded[unit],
            self._manifest.unit_inputs(unit),
            digest(*hashes),
            round(item.seconds, 4),
            self._made_with(unit),
        )
        write_record(self._store, unit, record)

    def _made_with(self, unit: Unit) -> MadeWith | None:
        if unit.kind != "features":
            return None
        encoder = self._encoders[unit.key]
        versions = str(torch.__version__), str(torchvision.__version__)
        return MadeWith(device_name(encoder.device), *versions, encoder.precision)
