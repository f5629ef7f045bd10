"""Makes units: reads the frames of a job, encodes them, and writes whole shards with their records.

The three stages run in parallel. A unit has the same bytes whoever makes it, so making one twice does no harm.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.cache import arrays
from cache_pipeline.cache.layout import Segment, Unit
from cache_pipeline.cache.ledger import LedgerRecord, RecordedSegment, write_record
from cache_pipeline.cache.manifest import check_claim
from cache_pipeline.cache.store_protocol import Stamp
from cache_pipeline.encoders.view_spec import ViewSpec
from cache_pipeline.encoders.views import ViewParameters, view_parameters
from cache_pipeline.errors import ChangedError, CorruptCacheError, DatasetError, EncoderError
from cache_pipeline.extract.encode import BatchEncoder, not_finite_row
from cache_pipeline.extract.matching import array_digest, frame_digests
from cache_pipeline.extract.prepare import Prepared
from cache_pipeline.extract.stages import ReadAhead, WriteBehind
from cache_pipeline.extract.units import Job, read_rows, rows_digest
from cache_pipeline.files import digest
from cache_pipeline.progress import Progress

ATTEMPTS = 3
"""Of writing a shard that another process writes at the same time, on an object store."""


class _Read(NamedTuple):
    """A job and its data: concatenated frames of all segments, or low-dim rows."""

    job: Job
    frames: NDArray[np.uint8]
    digests: NDArray[np.uint8]
    rows: dict[str, NDArray]
    recorded: dict[Unit, tuple[RecordedSegment, ...]]


class _Write(NamedTuple):
    """One unit to write: array name → live rows."""

    unit: Unit
    segments: tuple[Segment, ...]
    recorded: tuple[RecordedSegment, ...]
    values: dict[str, NDArray]
    seconds: float


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
    """Runs the three stages over the jobs of one extraction."""

    def __init__(self, prepared: Prepared, progress: bool) -> None:
        self.prepared = prepared
        self.read_s = self.encode_s = self.write_s = 0.0
        self._manifest = prepared.manifest
        self._batches = BatchEncoder(prepared.manifest.batch_size, prepared.manifest.dtype)
        self._progress = progress
        self._stored: dict[str, arrays.StoredArray] = {}
        self._claim: Stamp | None = None

    def run(self, claim: Stamp | None = None) -> None:
        """Makes all units of the work.

        Args:
            claim: the stamp of the claimed manifest, on an object store.
        """
        work, self._claim = self.prepared.work, claim
        for name in arrays.array_names(self._manifest):
            self._stored[name] = arrays.StoredArray(self.prepared.store, name, read_only=False)
        reader, writer = ReadAhead(self._read, work.jobs), WriteBehind(self._write)
        total = work.images + work.images_reused
        try:
            with Progress("encode", total, "images", done=work.images_reused) as bar, writer, reader as results:
                advance = bar.advance if self._progress else lambda count: None
                self._encode(results, writer, advance)
        finally:
            self.read_s, self.write_s = reader.seconds, writer.seconds
        if self._batches.batch_size != self._manifest.batch_size:
            smaller = replace(self._manifest, batch_size=self._batches.batch_size)
            self.prepared = self.prepared._replace(manifest=smaller)

    def _read(self, job: Job) -> _Read:
        dataset, none = self.prepared.dataset, np.zeros((0, 16), np.uint8)
        if not job.camera:
            pieces = [read_rows(dataset, segment) for segment in job.segments]
            rows = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
            recorded = {}
            for unit in job.units:
                names = arrays.unit_arrays(self._manifest, unit)
                digests = [rows_digest({name: piece[name] for name in names}) for piece in pieces]
                recorded[unit] = tuple(map(self._record, job.segments, digests))
            return _Read(job, none, none, rows, recorded)
        lengths = [segment.stop - segment.start for segment in job.segments]
        spans = [(s.demo, s.offset, s.offset + count) for s, count in zip(job.segments, lengths, strict=True)]
        frames = dataset.gather(job.camera, spans)
        frame_hashes = frame_digests(frames)
        parts = np.split(frame_hashes, np.cumsum(lengths)[:-1])
        segments = tuple(map(self._record, job.segments, map(array_digest, parts)))
        self._check_unchanged(job, segments)
        return _Read(job, frames, frame_hashes, {}, dict.fromkeys(job.units, segments))

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

    def _encode(self, results: Iterator[_Read], writer: WriteBehind[_Write], advance: Callable[[int], None]) -> None:
        for read in results:
            for unit in read.job.units:
                began = time.perf_counter()
                values = self._values(read, unit, advance)
                seconds = time.perf_counter() - began
                self.encode_s += seconds if unit.kind == "features" else 0.0
                writer.put(_Write(unit, read.job.segments, read.recorded[unit], values, seconds))

    def _values(self, read: _Read, unit: Unit, advance: Callable[[int], None]) -> dict[str, NDArray]:
        """Returns array name → rows of one unit."""
        if unit.kind == "frames":
            return {f"frame_digests/{unit.key}": read.digests}
        if unit.kind != "features":
            return read.rows
        encoder, views = self.prepared.encoders[unit.key].frozen, self._views(read, unit)
        return {f"features/{unit.key}": self._batches(encoder, read.frames, views, advance)}

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
        for segment in item.recorded:
            if row < segment.stop - segment.start:
                raise EncoderError(
                    f"{segment.file}: {segment.demo}: the feature of {unit.key} frame {segment.offset + row} is "
                    f"not finite in {self._manifest.dtype}; try --store-dtype float32 and --precision fp32"
                )
            row -= segment.stop - segment.start

    def _write(self, item: _Write) -> None:
        unit, hashes, size = item.unit, [], self._manifest.shard_rows
        if unit.kind == "features":
            self._check_finite(item.values[f"features/{unit.key}"], item)
        rows = np.concatenate([np.arange(segment.start, segment.stop) for segment in item.segments])
        for name in arrays.unit_arrays(self._manifest, unit):
            stored, values = self._stored[name], item.values[name]
            assert len(values) == len(rows), (unit, len(rows), len(values))
            hashes.append(_write_block(stored, unit, rows % size, values, self._claim).tobytes())
        base = unit.block * size
        span = (base, base + size)
        record = LedgerRecord(
            unit.name, span, item.recorded, self._manifest.unit_inputs(unit), digest(*hashes), round(item.seconds, 4)
        )
        write_record(self.prepared.store, unit, record)
