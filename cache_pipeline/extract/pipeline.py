"""Creates, resumes or extends a cache: read ▸ encode ▸ write. Units are written whole; the manifest is written last."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.cache import arrays
from cache_pipeline.cache.folder import (
    folder_bytes,
    make_beside,
    remove_other_weights,
    remove_partial_files,
    swap,
    told_when_full,
)
from cache_pipeline.cache.layout import Segment, Unit
from cache_pipeline.cache.ledger import LedgerRecord, RecordedSegment, write_record
from cache_pipeline.cache.lock import writer_lock
from cache_pipeline.cache.manifest import PENDING, Manifest, is_complete, write_pending
from cache_pipeline.cache.metadata import ROOT, complete_cache, metadata_files, root_file, write_metadata
from cache_pipeline.encoders.view_spec import ViewSpec
from cache_pipeline.encoders.views import ViewParameters, view_parameters
from cache_pipeline.errors import CacheError, CorruptCacheError, DatasetError, EncoderError, counted
from cache_pipeline.extract.camera_encoders import save_weights
from cache_pipeline.extract.config import ExtractConfig
from cache_pipeline.extract.encode import BatchEncoder, not_finite_row
from cache_pipeline.extract.finish import finish, is_up_to_date
from cache_pipeline.extract.matching import array_digest, frame_digests
from cache_pipeline.extract.prepare import Prepared, metadata_digests, planned_bytes, prepare
from cache_pipeline.extract.stages import ReadAhead, WriteBehind
from cache_pipeline.extract.units import Job, read_rows, rows_digest
from cache_pipeline.files import NOT_ALLOWED, digest, resolved
from cache_pipeline.memory import retained_memory
from cache_pipeline.progress import Progress

logger = logging.getLogger("cache_pipeline")


class ExtractResult(NamedTuple):
    """Figures of an extraction.

    Attributes:
        images: frames encoded, each view counted.
        seconds: total wall time; read_s, encode_s, write_s: time of each stage. Stages run in parallel.
        bytes: size of the cache.
        units_encoded, units_reused: units written by this run, and units that were already finished.
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
        images = counted(self.images, "image")
        return [
            f"{self.cache}: complete, {self.bytes / 1e6:.1f} MB, fingerprint {self.fingerprint}",
            f"{images} of {', '.join(self.cameras)} in {self.seconds:.1f} s, {self.images_per_s:.1f}/s",
            f"stages (in parallel): {stages}",
            f"{counted(self.units_encoded, 'unit')} written, {self.units_reused} reused",
        ]


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


def extract_features(config: ExtractConfig, *, progress: bool = True) -> ExtractResult:
    """Encodes every frame that the cache does not hold yet.

    After a kill, the next call continues with the first unfinished unit. The result has the same digests as without the
    kill.

    Args:
        config: what to extract.
        progress: report on stderr.

    Raises:
        CacheLockedError: another process is writing the cache.
        StaleCacheError, NotACacheError, DatasetError, EncoderError, ConfigError: before any work.
        CacheError: the disk is full.
    """
    started = time.perf_counter()
    with retained_memory():
        prepared, finished, run = _extract(config, progress)
    seconds = time.perf_counter() - started
    return ExtractResult(
        cache=str(config.out),
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


def _extract(config: ExtractConfig, progress: bool) -> tuple[Prepared, Manifest, _Run]:
    """Extracts under the writer's lock and returns the manifest of the complete cache."""
    out = resolved(config.out)
    with ExitStack() as stack:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(writer_lock(out))
        except OSError as error:
            return _nothing_to_do(config, out, error)
        prepared = prepare(config, out)
        _tell_changes(prepared)
        with told_when_full(out, planned_bytes(prepared)):
            run = _Run(prepared, progress)
            if is_up_to_date(prepared):
                assert prepared.old is not None
                finished = prepared.old
                (prepared.path / PENDING).unlink(missing_ok=True)  # left by an earlier extension
            else:
                with ThreadPoolExecutor(1) as background:
                    begun = _begin(prepared, background)
                    run.run()
                    prepared = run.prepared
                    finished = finish(prepared, begun.result())
                complete_cache(prepared.path, finished)
                remove_other_weights(prepared.path, finished.encoders.values())
            if prepared.path != prepared.out:
                swap(prepared.path, prepared.out)
    return prepared, finished, run


def _nothing_to_do(config: ExtractConfig, out: Path, error: OSError) -> tuple[Prepared, Manifest, _Run]:
    """Returns the result of an up-to-date cache that is not writable; raises CacheError if it is not up to date."""
    if error.errno not in NOT_ALLOWED or not is_complete(out):
        raise error
    prepared = prepare(config, out, change=False)
    if prepared.old is None or not is_up_to_date(prepared):
        raise CacheError(
            f"{config.out} is not up to date and cannot be written ({error.strerror}: {error.filename}); "
            "get write permission, or give another --out"
        ) from error
    return prepared, prepared.old, _Run(prepared, progress=False)


def _tell_changes(prepared: Prepared) -> None:
    if prepared.old is None:
        return
    for what in ("added", "changed", "removed"):
        names = getattr(prepared.matching, what)
        if names:
            shown = ", ".join(names[:5]) + (f", … ({len(names) - 5} more)" if len(names) > 5 else "")
            logger.info("%s: %d demos %s: %s", prepared.out, len(names), what, shown)


def _begin(prepared: Prepared, background: Executor) -> Future[dict[str, str]]:
    """Prepares the folder; the weights are written in the background.

    Returns:
        Future of the digests of its metadata and weights.
    """
    if prepared.path == prepared.out:
        prepared.path.mkdir(parents=True, exist_ok=True)
    else:
        make_beside(prepared.path, prepared.out, "new")
    remove_partial_files(prepared.path)
    files = metadata_files(prepared.manifest)
    metadata = {name: digest(content) for name, content in files.items()}
    write_pending(prepared.path, replace(prepared.manifest, metadata=metadata))
    # A cache that is extended keeps its root group: it describes what is complete until all else is.
    root = {} if prepared.old else {ROOT: root_file(prepared.manifest, complete=False)}
    write_metadata(prepared.path, {**root, **files})
    return background.submit(_save_weights, prepared)


def _save_weights(prepared: Prepared) -> dict[str, str]:
    save_weights(prepared.path, prepared.encoders, prepared.old.metadata if prepared.old else {})
    metadata = metadata_digests(prepared)
    write_pending(prepared.path, replace(prepared.manifest, metadata=metadata))
    return metadata


def _stored_block(
    stored: arrays.StoredArray, unit: Unit, rows: NDArray[np.int64], values: NDArray[Any]
) -> NDArray[Any] | None:
    """Returns the stored shard if its ``rows`` equal ``values``, else None. Other rows of it may be in use."""
    if not stored.has_block(unit.block, unit.view):
        return None
    try:
        block = stored.block(unit.block, unit.view)
    except CorruptCacheError:
        return None
    return block if block[rows].tobytes() == values.astype(stored.dtype, copy=False).tobytes() else None


class _Run:
    """Runs the three stages over the jobs of one extraction."""

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
            block = _stored_block(stored, unit, rows % size, values)
            if block is None:
                block = np.full((size, *stored.row_shape), stored.fill, stored.dtype)
                block[rows % size] = values
                stored.write_block(unit.block, block, unit.view)
            hashes.append(block.tobytes())
        base = unit.block * size
        span = (base, base + size)
        record = LedgerRecord(
            unit.name, span, item.recorded, self._manifest.unit_inputs(unit), digest(*hashes), round(item.seconds, 4)
        )
        write_record(self.prepared.path, unit, record)
