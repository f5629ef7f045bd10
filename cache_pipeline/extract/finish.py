"""The end of an extraction: checks that every row was written, and makes the manifest."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

from numpy.typing import NDArray

from cache_pipeline.cache.arrays import StoredArray, array_names
from cache_pipeline.cache.ledger import LedgerRecord, record_name, record_names
from cache_pipeline.cache.manifest import Manifest
from cache_pipeline.cache.stillness import still_cameras
from cache_pipeline.cache.store import exists
from cache_pipeline.cache.table import DemoRows
from cache_pipeline.errors import DatasetError, IncompleteCacheError
from cache_pipeline.extract.matching import array_digest
from cache_pipeline.extract.prepare import Prepared
from cache_pipeline.extract.units import UnitCheck
from cache_pipeline.files import digest
from cache_pipeline.text import few

logger = logging.getLogger("cache_pipeline")


def is_up_to_date(prepared: Prepared) -> bool:
    """Whether the cache is already complete, including the bytes of its metadata and weights."""
    old, new = prepared.old, prepared.manifest
    if old is None or prepared.work.jobs or new != replace(old, units={}, metadata={}):
        return False
    store = prepared.store
    return all(exists(store, name) and digest(store.read(name)) == was for name, was in old.metadata.items())


def finish(prepared: Prepared, metadata: dict[str, str]) -> Manifest:
    """Returns the manifest of the finished cache, with the digests of its metadata and weights.

    Raises:
        DatasetError: a source file changed during the extraction.
        IncompleteCacheError: another process has written a unit of its own in place of one of these.
    """
    _check_sources(prepared)
    records = _records(prepared)
    units = {name: record.output for name, record in records.items()}
    devices = {record.made_with.device for record in records.values() if record.made_with is not None}
    demos = _with_digests(prepared)
    for sentence in few(still_cameras(prepared.store, prepared.manifest), "camera", more="inspect --json lists all"):
        logger.warning("%s; a policy cannot learn from these frames: render them again", sentence)
    return replace(prepared.manifest, demos=demos, units=units, metadata=metadata, devices=tuple(sorted(devices)))


def missing_units(prepared: Prepared) -> list[str]:
    """Returns the units of the whole cache that are not done; records are read only if there is one of every unit."""
    manifest = prepared.manifest
    units, recorded = list(manifest.live_units()), set(record_names(prepared.store))
    absent = [unit.name for unit in units if record_name(unit) not in recorded]
    if absent:
        return absent
    kept = [index is not None for index in prepared.matching.kept]
    check, blocks = UnitCheck(prepared.store, manifest, prepared.dataset, kept), manifest.block_segments()
    return [unit.name for unit in units if check.find(unit, blocks[unit.block]) is None]


def _check_sources(prepared: Prepared) -> None:
    for source in prepared.dataset.files:
        source.check_unchanged()


def _records(prepared: Prepared) -> dict[str, LedgerRecord]:
    """Returns unit → record; asserts that the records cover each live row of each array exactly once."""
    manifest = prepared.manifest
    check = UnitCheck(prepared.store, manifest, prepared.dataset, [True] * len(manifest.demos))
    blocks = manifest.block_segments()
    covered = sum(segment.stop - segment.start for segments in blocks.values() for segment in segments)
    assert covered == sum(demo.length for demo in manifest.demos), "rows of two demos overlap"
    records = {}
    for unit in manifest.live_units():
        record = check.find(unit, blocks[unit.block])
        if record is None:
            raise IncompleteCacheError(
                f"{prepared.out.place}: {unit.name} was written again by another process; run the same command again"
            )
        records[unit.name] = record
    return records


def _with_digests(prepared: Prepared) -> tuple[DemoRows, ...]:
    manifest = prepared.manifest
    spans = [(demo.row, demo.row + demo.length) for demo in manifest.demos]
    found: list[dict[str, str]] = [{} for _ in spans]
    for name in array_names(manifest):
        if name.startswith("features/"):
            continue
        values = StoredArray(prepared.store, name).spans(spans)
        for digests, part in zip(found, _split(values, spans), strict=True):
            digests[name.removeprefix("frame_digests/")] = array_digest(part)
    for row, digests in zip(manifest.demos, found, strict=True):
        changed = [name for name, was in row.digests.items() if digests.get(name, was) != was]
        if changed:
            raise DatasetError(
                f"{manifest.files[row.file].path}: {row.name}: {changed[0]} has changed although the file's size and "
                "time have not; run the same command again with --deep"
            )
    return tuple(row._replace(digests=digests) for row, digests in zip(manifest.demos, found, strict=True))


def _split(values: NDArray, spans: Sequence[tuple[int, int]]) -> Iterator[NDArray]:
    at = 0
    for start, stop in spans:
        yield values[at : at + stop - start]
        at += stop - start
