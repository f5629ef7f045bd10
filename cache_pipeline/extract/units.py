"""Finds the units to write: a unit is done only if its ledger record matches the current settings and data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cache_pipeline.cache.arrays import unit_arrays
from cache_pipeline.cache.layout import Segment, Unit
from cache_pipeline.cache.ledger import LedgerRecord, RecordedSegment, read_record
from cache_pipeline.cache.manifest import Manifest
from cache_pipeline.cache.store_protocol import Store
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.extract.matching import array_digest, frame_digests
from cache_pipeline.extract.parts import Part
from cache_pipeline.files import digest


class Job(NamedTuple):
    """Data that are read once: the frames of one camera in one block, or (camera "") the low-dim rows of one block.

    Attributes:
        segments: the live rows of the block.
        units: the units to write from them.
        known: row of a segment → recorded digest of its frames.
    """

    camera: str
    block: int
    segments: tuple[Segment, ...]
    units: tuple[Unit, ...]
    known: Mapping[int, str]

    @property
    def name(self) -> str:
        """The name of its main unit, for messages."""
        return self.units[-1].name

    @property
    def rows(self) -> int:
        """Live rows."""
        return sum(segment.stop - segment.start for segment in self.segments)

    @property
    def views(self) -> tuple[int, ...]:
        """Views to encode."""
        return tuple(unit.view for unit in self.units if unit.kind == "features")


class Work(NamedTuple):
    """All jobs of an extraction, the numbers of finished units and images, and the devices that made these."""

    jobs: tuple[Job, ...]
    units_reused: int = 0
    images_reused: int = 0
    devices: frozenset[str] = frozenset()

    @property
    def units(self) -> int:
        """Units to write."""
        return sum(len(job.units) for job in self.jobs)

    @property
    def images(self) -> int:
        """Number of images to encode, each view counted."""
        return sum(job.rows * len(job.views) for job in self.jobs)


class UnitCheck:
    """Compares ledger records with the current settings and data.

    Args:
        store: the cache.
        manifest: the future manifest.
        dataset: the source of frames.
        kept: for each demo of the table, whether its rows are already complete and unchanged.
    """

    def __init__(self, store: Store, manifest: Manifest, dataset: Dataset, kept: Sequence[bool]) -> None:
        self._store, self._manifest, self._dataset, self._kept = store, manifest, dataset, kept

    def find(self, unit: Unit, segments: Sequence[Segment]) -> LedgerRecord | None:
        """Returns the unit's record if it is done, else None."""
        record = read_record(self._store, unit)
        if record is None or record.inputs != self._manifest.unit_inputs(unit):
            return None
        recorded = {(segment.start, segment.stop): segment for segment in record.segments}
        for segment in segments:
            found = recorded.get((segment.start, segment.stop))
            if found is None or not self._fits(unit, segment, found):
                return None
        return record

    def _fits(self, unit: Unit, segment: Segment, found: RecordedSegment) -> bool:
        demo = self._manifest.demos[segment.demo]
        if unit.kind == "features" and unit.view > 0 and found.view_key != demo.view_key:
            return False
        if self._kept[segment.demo]:
            return True
        source = self._manifest.files[demo.file]
        if not source.linked and found[:5] == (*source[:3], demo.name, segment.offset):
            return True
        return found.digest == self._read_digest(unit, segment)

    def _read_digest(self, unit: Unit, segment: Segment) -> str:
        if unit.kind in ("steps", "low_dim"):
            rows = read_rows(self._dataset, segment)
            return rows_digest({name: rows[name] for name in unit_arrays(self._manifest, unit)})
        stop = segment.offset + segment.stop - segment.start
        return array_digest(frame_digests(self._dataset.frames(segment.demo, unit.key, segment.offset, stop)))


def read_rows(dataset: Dataset, segment: Segment) -> dict[str, np.ndarray]:
    """Reads the low-dim rows of one segment."""
    rows = slice(segment.offset, segment.offset + segment.stop - segment.start)
    return {name: values[rows] for name, values in dataset.rows(segment.demo).items()}


def rows_digest(rows: Mapping[str, np.ndarray]) -> str:
    """Returns the digest of one segment's rows of several arrays."""
    return digest(*(np.ascontiguousarray(rows[name]).tobytes() for name in sorted(rows)))


def find_work(
    store: Store, manifest: Manifest, dataset: Dataset, kept: Sequence[bool], part: Part | None = None
) -> Work:
    """Returns all units that are not done, block by block, grouped so that each frame is read once.

    Args:
        part: only the jobs of this part. All jobs are numbered camera by camera, so that every part gets an equal share
            of the blocks of each camera.
    """
    check = UnitCheck(store, manifest, dataset, kept)
    blocks = manifest.block_segments()
    jobs, units_reused, images_reused = [], 0, 0
    devices: set[str] = set()
    for number, (block, segments) in enumerate(blocks.items()):
        for rank, (camera, units) in enumerate(_units_of(manifest, block).items()):
            if part is not None and not part.owns(rank * len(blocks) + number):
                continue
            records = {unit: check.find(unit, segments) for unit in units}
            missing = tuple(unit for unit in units if records[unit] is None)
            devices |= {r.made_with.device for r in records.values() if r is not None and r.made_with is not None}
            rows = sum(segment.stop - segment.start for segment in segments)
            units_reused += len(units) - len(missing)
            images_reused += rows * sum(unit.kind == "features" and unit not in missing for unit in units)
            if missing:
                first = next((record for record in records.values() if record is not None), None)
                known = {s.start: s.digest for s in first.segments} if first is not None else {}
                jobs.append(Job(camera, block, segments, missing, known))
    return Work(tuple(jobs), units_reused, images_reused, frozenset(devices))


def _units_of(manifest: Manifest, block: int) -> dict[str, list[Unit]]:
    units = {"": [Unit("steps", "", 0, block), *(Unit("low_dim", key, 0, block) for key in manifest.low_dim)]}
    for camera, entry in manifest.cameras.items():
        views = [Unit("features", camera, view, block) for view in range(entry.views)]
        units[camera] = [Unit("frames", camera, 0, block), *views]
    return units
