"""Frees the space of rows whose demos were removed: copies live rows to a new cache, then swaps it in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from cache_pipeline.cache.arrays import StoredArray, array_names, unit_arrays
from cache_pipeline.cache.folder import finish_swap, make_beside, remove_cache, swap, told_when_full, unused_sibling
from cache_pipeline.cache.layout import Segment, Unit, place_demos
from cache_pipeline.cache.ledger import LedgerRecord, MadeWith, RecordedSegment, read_record, write_record
from cache_pipeline.cache.lock import writing
from cache_pipeline.cache.manifest import Manifest
from cache_pipeline.cache.manifest_store import MANIFEST, PENDING, read_manifest, write_pending
from cache_pipeline.cache.metadata import ROOT, complete_cache, metadata_files, root_file, write_metadata
from cache_pipeline.cache.store import Place, exists, store_at, stored_bytes
from cache_pipeline.cache.store_protocol import Store
from cache_pipeline.cache.table import DemoRows
from cache_pipeline.files import digest


class CompactResult(NamedTuple):
    """Total file size before and after in bytes, and the number of dead rows that were freed."""

    cache: str
    bytes_before: int
    bytes_after: int
    rows_freed: int

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as a JSON object."""
        return self._asdict()

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{self.cache}: freed {self.rows_freed} dead rows, "
            f"{self.bytes_before / 1e6:.1f} MB before, {self.bytes_after / 1e6:.1f} MB now"
        ]


def compact(place: Place) -> CompactResult:
    """Rewrites a complete cache without dead rows and keeps its fingerprint. Drops an unfinished extension.

    Raises:
        NotACacheError, IncompleteCacheError, CorruptCacheError: there is no complete, undamaged cache; nothing changes.
        CacheLockedError: another process is writing it.
        CacheError: the disk is full; the cache is unchanged.
    """
    with writing(place) as store:
        finish_swap(store)
        stamp = store.stamp(MANIFEST)
        manifest = read_manifest(store)
        before, live = stored_bytes(store), manifest.rows
        new = unused_sibling(store, "compact")
        with told_when_full(store.place, before, "; the cache is unchanged"):
            try:
                make_beside(new, store, "compact")
                _copy(store, manifest, new)
            except BaseException:
                remove_cache(new)
                raise
        swap(new, store, stamp)
        return CompactResult(str(store_at(place).place), before, stored_bytes(store), manifest.n_rows - live)


def _copy(store: Store, old: Manifest, new: Store) -> None:
    lengths = [demo.length for demo in old.demos]
    placement = place_demos(lengths, [None] * len(lengths), 0, old.shard_rows)
    demos = tuple(demo._replace(row=row) for demo, row in zip(old.demos, placement.rows, strict=True))
    target = replace(old, demos=demos, n_rows=placement.n_rows, units={}, metadata={})
    write_pending(new, target)
    files = metadata_files(target)
    write_metadata(new, {ROOT: root_file(target, complete=False), **files})
    write_metadata(new, {file: store.read(file) for file in old.encoders.values()})
    names = array_names(old)
    source = {name: StoredArray(store, name) for name in names}
    sink = {name: StoredArray(new, name, read_only=False) for name in names}
    units = {}
    blocks = target.block_segments()
    for unit in target.live_units():
        segments = blocks[unit.block]
        output = [_copy_block(source[name], sink[name], old.demos, segments, unit) for name in unit_arrays(old, unit)]
        record = _record(target, unit, segments, sink, digest(*output))
        record = record._replace(made_with=_made_with(store, old, unit, segments))
        write_record(new, unit, record)
        units[unit.name] = record.output
    metadata = {name: digest(content) for name, content in files.items()}
    metadata |= {file: old.metadata[file] for file in old.encoders.values()}
    complete_cache(new, replace(target, units=units, metadata=metadata))
    assert not exists(new, PENDING)


def _copy_block(
    source: StoredArray, sink: StoredArray, old: Sequence[DemoRows], segments: Sequence[Segment], unit: Unit
) -> bytes:
    values = np.full((sink.shard_rows, *sink.row_shape), sink.fill, sink.dtype)
    base = unit.block * sink.shard_rows
    for segment in segments:
        start = old[segment.demo].row + segment.offset
        span = (start, start + segment.stop - segment.start)
        values[segment.start - base : segment.stop - base] = source.spans([span], unit.view)
    sink.write_block(unit.block, values, unit.view)
    return values.tobytes()


def _made_with(place: Place, old: Manifest, unit: Unit, segments: Sequence[Segment]) -> MadeWith | None:
    """Returns what computed the copied features; None if it is not recorded, or is not the same for all of them."""
    rows = [old.demos[segment.demo].row + segment.offset for segment in segments]
    spans = [(row, row + segment.stop - segment.start) for row, segment in zip(rows, segments, strict=True)]
    size = old.shard_rows
    blocks = {block for start, stop in spans for block in range(start // size, -(-stop // size))}
    records = [read_record(place, unit._replace(block=block)) for block in sorted(blocks)]
    found = {record.made_with if record is not None else None for record in records}
    return found.pop() if len(found) == 1 else None


def _record(
    target: Manifest, unit: Unit, segments: Sequence[Segment], sink: Mapping[str, StoredArray], output: str
) -> LedgerRecord:
    """Builds the record that an extraction would have written, from the copied digests and rows."""
    by_frame = unit.kind in ("features", "frames")
    inputs = [f"frame_digests/{unit.key}"] if by_frame else unit_arrays(target, unit)
    recorded = []
    for segment in segments:
        demo, span = target.demos[segment.demo], (segment.start, segment.stop)
        content = digest(*(sink[name].spans([span]).tobytes() for name in inputs))
        source = target.files[demo.file]
        recorded.append(RecordedSegment(*source[:3], demo.name, segment.offset, *span, demo.view_key, content))
    base = unit.block * target.shard_rows
    rows = (base, base + target.shard_rows)
    return LedgerRecord(unit.name, rows, tuple(recorded), target.unit_inputs(unit), output, 0.0)
