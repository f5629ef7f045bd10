"""Read ▸ encode ▸ write: makes, resumes or extends a cache. Units are written whole, the manifest last."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.cache import arrays
from cache_pipeline.cache.folder import folder_bytes, remove_other_files, remove_partial_files, swap, told_when_full
from cache_pipeline.cache.layout import Segment, Unit
from cache_pipeline.cache.ledger import LedgerRecord, RecordedSegment, write_record
from cache_pipeline.cache.lock import writer_lock
from cache_pipeline.cache.manifest import write_manifest, write_pending
from cache_pipeline.encoders.views import ViewParameters, ViewSpec, view_parameters
from cache_pipeline.errors import DatasetError, EncoderError
from cache_pipeline.extract.camera_encoders import save_weights
from cache_pipeline.extract.config import ExtractConfig
from cache_pipeline.extract.encode import BatchEncoder, Encoding, not_finite_row
from cache_pipeline.extract.finish import finish, is_up_to_date
from cache_pipeline.extract.lanes import MAX_LANES
from cache_pipeline.extract.matching import array_digest, frame_digests
from cache_pipeline.extract.prepare import Prepared, metadata_digests, planned_bytes, prepare
from cache_pipeline.extract.stages import ReadAhead, WriteBehind
from cache_pipeline.extract.units import Job, read_rows, rows_digest
from cache_pipeline.files import digest
from cache_pipeline.memory import retained_memory
from cache_pipeline.progress import Progress

logger = logging.getLogger("cache_pipeline")


class ExtractResult(NamedTuple):
    """What an extraction did.

    Attributes:
        images: frames encoded, each view counted.
        seconds: of wall time in all; read_s, encode_s, write_s: of each stage, which run at the same time.
        bytes: size of the cache.
        units_encoded, units_reused: units written by this run, and found finished.
    """

    cache: str
    images: int
    cameras: tuple[str, ...]
    seconds: float
    images_per_s: float
    read_s: float
    encode_s: float
    write_s: float
    bytes: int
    units_encoded: int
    units_reused: int
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        """A JSON object of the fields."""
        return {**self._asdict(), "cameras": list(self.cameras)}

    def lines(self) -> list[str]:
        """For people."""
        stages = f"read {self.read_s:.1f} s, encode {self.encode_s:.1f} s, write {self.write_s:.1f} s"
        return [
            f"{self.cache}: complete, {self.bytes / 1e6:.1f} MB, fingerprint {self.fingerprint}",
            f"{self.images} images of {', '.join(self.cameras)} in {self.seconds:.1f} s, {self.images_per_s:.1f}/s",
            f"stages, which run at the same time: {stages}",
            f"{self.units_encoded} units written, {self.units_reused} reused",
        ]


class _Read(NamedTuple):
    """A job with what was read for it: frames of all segments, one after another, or low-dim rows."""

    job: Job
    frames: NDArray[np.uint8]
    digests: NDArray[np.uint8]
    rows: dict[str, NDArray]
    segments: tuple[RecordedSegment, ...]


class _Write(NamedTuple):
    """One unit to write: array name → live rows."""

    unit: Unit
    segments: tuple[Segment, ...]
    recorded: tuple[RecordedSegment, ...]
    values: dict[str, NDArray]
    seconds: float


def extract_features(config: ExtractConfig, *, progress: bool = True) -> ExtractResult:
    """Runs the frozen encoder over every frame that the cache does not hold yet.

    Killed at any moment and run again, it goes on with the first unfinished unit and gives the same digests as a run
    that was not killed.

    Args:
        config: what to extract.
        progress: report on stderr.

    Raises:
        CacheLockedError: another process is writing the cache.
        StaleCacheError, NotACacheError, DatasetError, EncoderError, ConfigError: before any work.
        CacheError: the disk is full.
    """
    started = time.perf_counter()
    Path(config.out).absolute().parent.mkdir(parents=True, exist_ok=True)
    with writer_lock(config.out), retained_memory():
        prepared = prepare(config)
        _tell_changes(prepared)
        with told_when_full(prepared.path, planned_bytes(prepared)):
            run = _Run(prepared, progress)
            if not is_up_to_date(prepared):
                with ThreadPoolExecutor(1) as background:
                    begun = _begin(prepared, background)
                    run.run()
                    prepared = run.prepared
                    finished = finish(prepared, begun.result())
                write_manifest(prepared.path, finished)
                remove_other_files(prepared.path / "encoder", {Path(file).name for file in finished.encoders.values()})
            else:
                finished = prepared.manifest if prepared.old is None else prepared.old
            if prepared.path != prepared.out:
                swap(prepared.path, prepared.out)
    seconds = time.perf_counter() - started
    return ExtractResult(
        cache=str(prepared.out),
        images=prepared.work.images,
        cameras=tuple(finished.cameras),
        seconds=seconds,
        images_per_s=prepared.work.images / seconds,
        read_s=run.read_s,
        encode_s=run.encode_s,
        write_s=run.write_s,
        bytes=folder_bytes(prepared.out),
        units_encoded=prepared.work.units,
        units_reused=prepared.work.units_reused,
        fingerprint=finished.fingerprint,
    )


def _tell_changes(prepared: Prepared) -> None:
    if prepared.old is None:
        return
    for what in ("added", "changed", "removed"):
        names = getattr(prepared.matching, what)
        if names:
            shown = ", ".join(names[:5]) + (f", … ({len(names) - 5} more)" if len(names) > 5 else "")
            logger.info("%s: %d demos %s: %s", prepared.out, len(names), what, shown)


def _begin(prepared: Prepared, background: Executor) -> Future[dict[str, str]]:
    """Makes the folder ready; the weights go into it in the background.

    Returns:
        Digests of its metadata and weights.
    """
    prepared.path.mkdir(parents=True, exist_ok=True)
    remove_partial_files(prepared.path)
    write_pending(prepared.path, prepared.manifest)
    arrays.write_metadata(prepared.path, arrays.metadata_files(prepared.manifest))
    return background.submit(_save_weights, prepared)


def _save_weights(prepared: Prepared) -> dict[str, str]:
    save_weights(prepared.path, prepared.encoders, prepared.old.metadata if prepared.old else {})
    metadata = metadata_digests(prepared)
    write_pending(prepared.path, replace(prepared.manifest, metadata=metadata))
    return metadata


def _may_wait(started: Sequence[tuple[_Read, Unit, Encoding | None]]) -> bool:
    """Whether the first unit can be waited for: enough batches of later ones are under way to keep all lanes busy."""
    if started[0][2] is None:
        return True
    later = [encoding.batches for _, _, encoding in list(started)[1:] if encoding is not None]
    return sum(later) >= MAX_LANES


class _Run:
    """The three stages over the jobs of one extraction."""

    def __init__(self, prepared: Prepared, progress: bool) -> None:
        self.prepared = prepared
        self.read_s = self.encode_s = self.write_s = 0.0
        self._manifest = prepared.manifest
        self._batches = BatchEncoder(prepared.manifest.batch_size, prepared.manifest.dtype)
        self._progress = progress
        self._stored: dict[str, arrays.StoredArray] = {}

    def run(self) -> None:
        work = self.prepared.work
        for name in arrays.array_names(self._manifest):
            self._stored[name] = arrays.StoredArray(self.prepared.path, name, read_only=False)
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
            recorded = tuple(self._record(s, rows_digest(piece)) for s, piece in zip(job.segments, pieces, strict=True))
            return _Read(job, none, none, rows, recorded)
        lengths = [segment.stop - segment.start for segment in job.segments]
        spans = [(s.demo, s.offset, s.offset + count) for s, count in zip(job.segments, lengths, strict=True)]
        frames = dataset.gather(job.camera, spans)
        digests = frame_digests(frames)
        parts = np.split(digests, np.cumsum(lengths)[:-1])
        recorded = tuple(self._record(s, array_digest(part)) for s, part in zip(job.segments, parts, strict=True))
        self._check_unchanged(job, recorded)
        return _Read(job, frames, digests, {}, recorded)

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
        """Encodes units one after another; the next ones are begun before the last one is waited for."""
        started: deque[tuple[_Read, Unit, Encoding | None]] = deque()
        try:
            for read in results:
                for unit in read.job.units:
                    started.append((read, unit, self._start(read, unit, advance)))
                    while started and _may_wait(started):
                        self._hand_over(*started.popleft(), writer)
            while started:
                self._hand_over(*started.popleft(), writer)
        finally:
            for _, _, encoding in started:
                if encoding is not None:
                    encoding.cancel()

    def _start(self, read: _Read, unit: Unit, advance: Callable[[int], None]) -> Encoding | None:
        if unit.kind in ("rows", "frames"):
            return None
        began = time.perf_counter()
        encoder = self.prepared.encoders[unit.camera].frozen
        encoding = self._batches.start(encoder, read.frames, self._views(read, unit), advance)
        self.encode_s += time.perf_counter() - began
        return encoding

    def _hand_over(self, read: _Read, unit: Unit, encoding: Encoding | None, writer: WriteBehind[_Write]) -> None:
        began = time.perf_counter()
        if encoding is not None:
            values = {f"features/{unit.camera}": encoding.result()}
        else:
            values = read.rows if unit.kind == "rows" else {f"frame_digests/{unit.camera}": read.digests}
        seconds = time.perf_counter() - began
        self.encode_s += seconds if encoding is not None else 0.0
        writer.put(_Write(unit, read.job.segments, read.segments, values, seconds))

    def _views(self, read: _Read, unit: Unit) -> list[ViewParameters] | None:
        if unit.view == 0:
            return None
        spec = ViewSpec.from_json(self._manifest.cameras[unit.camera].view_spec or {})
        views = []
        for segment in read.segments:
            drawn = view_parameters(spec, segment.view_key, unit.camera, unit.view)
            views += [drawn] * (segment.stop - segment.start)
        return views

    def _check_finite(self, features: NDArray, item: _Write) -> None:
        row, unit = not_finite_row(features), item.unit
        if row is None:
            return
        for segment in item.recorded:
            if row < segment.stop - segment.start:
                raise EncoderError(
                    f"{segment.file}: {segment.demo}: the feature of {unit.camera} frame {segment.offset + row} is "
                    f"not finite in {self._manifest.dtype}; try --store-dtype float32 and --precision fp32"
                )
            row -= segment.stop - segment.start

    def _write(self, item: _Write) -> None:
        unit, hashes, size = item.unit, [], self._manifest.shard_rows
        base = unit.block * size
        if unit.kind == "features":
            self._check_finite(item.values[f"features/{unit.camera}"], item)
        for name in arrays.unit_arrays(self._manifest, unit):
            stored, values = self._stored[name], item.values[name]
            block = np.full((size, *stored.row_shape), stored.fill, stored.dtype)
            at = 0
            for segment in item.segments:
                count = segment.stop - segment.start
                block[segment.start - base : segment.stop - base] = values[at : at + count]
                at += count
            assert at == len(values), (unit, at, len(values))
            stored.write_block(unit.block, block, unit.view)
            hashes.append(block.tobytes())
        span = (base, base + size)
        record = LedgerRecord(
            unit.name, span, item.recorded, self._manifest.unit_inputs(unit), digest(*hashes), round(item.seconds, 4)
        )
        write_record(self.prepared.path, unit, record)
