"""Plans an extraction without executing it (``--dry-run``)."""

from __future__ import annotations

import math
import resource
import sys
import time
from typing import Any, NamedTuple

import numpy as np

from cache_pipeline.cache.store import real_store
from cache_pipeline.errors import counted
from cache_pipeline.extract.config import ExtractConfig
from cache_pipeline.extract.encode import BatchEncoder
from cache_pipeline.extract.prepare import Prepared, planned_bytes, prepare
from cache_pipeline.extract.units import Job
from cache_pipeline.text import listed

TIMED_BATCHES = 3
UNITS_IN_FLIGHT = 4
"""Units whose frames are in memory: one in the child that reads, two read ahead, and the one that is encoded."""


class ExtractionPlan(NamedTuple):
    """The work of an extraction.

    Attributes:
        images: frames to encode, each view counted; images_reused: frames already in the cache.
        units: units to write; units_reused: finished units.
        bytes: upper bound of the bytes to write.
        seconds: estimate from a few batches of real frames on this machine; None if nothing must be encoded.
        memory: largest memory of the process so far, which has encoded such batches, and of the units in flight, in
            bytes; None as above.
        added, changed, removed: names of demos.
    """

    cache: str
    demos: int
    cameras: tuple[str, ...]
    views: int
    images: int
    images_reused: int
    units: int
    units_reused: int
    bytes: int
    seconds: float | None
    memory: int | None
    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON object of the fields."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in self._asdict().items()}

    def lines(self) -> list[str]:
        """For people."""
        cameras = listed(self.cameras, limit=5)
        lines = [
            f"{self.cache}: {counted(self.demos, 'demo')}, {cameras}, {counted(self.views, 'view')}",
            f"{counted(self.images, 'image')} to encode, {self.images_reused} already in the cache",
            f"{counted(self.units, 'unit')} to write, {self.units_reused} already in the cache",
            f"{self.bytes / 1e6:.1f} MB to write at most",
        ]
        if self.seconds is not None:
            lines.append(f"about {self.seconds:.0f} s on this machine")
        if self.memory is not None:
            lines.append(f"about {self.memory / 1e9:.1f} GB of memory at most")
        for what in ("added", "changed", "removed"):
            names = getattr(self, what)
            if names:
                lines.append(f"{counted(len(names), 'demo')} {what}: {listed(names, limit=10)}")
        return lines


def plan_extraction(config: ExtractConfig) -> ExtractionPlan:
    """Returns the work of :func:`extract_features`; writes nothing.

    Raises:
        StaleCacheError, NotACacheError, DatasetError, EncoderError, ConfigError: as :func:`extract_features`.
    """
    prepared = prepare(config, real_store(config.out), change=False)
    work, matching = prepared.work, prepared.matching
    return ExtractionPlan(
        cache=str(config.out),
        demos=len(prepared.manifest.demos),
        cameras=tuple(prepared.manifest.cameras),
        views=max(entry.views for entry in prepared.manifest.cameras.values()),
        images=work.images,
        images_reused=work.images_reused,
        units=work.units,
        units_reused=work.units_reused,
        bytes=planned_bytes(prepared) if work.units else 0,
        seconds=_estimate(prepared) if work.images else None,
        memory=_memory(prepared) if work.images else None,
        added=matching.added,
        changed=matching.changed,
        removed=matching.removed,
    )


def _estimate(prepared: Prepared) -> float:
    """Estimates the seconds to encode all images from a few batches of each camera's frames."""
    batches = BatchEncoder(prepared.manifest.batch_size, prepared.manifest.dtype)
    seconds, timed = 0.0, {}
    for job in prepared.work.jobs:
        if job.views:
            if job.camera not in timed:
                timed[job.camera] = _seconds_per_image(prepared, job, batches)
            seconds += timed[job.camera] * job.rows * len(job.views)
    return seconds


def _memory(prepared: Prepared) -> int:
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    shapes = [prepared.manifest.cameras[job.camera].image_shape for job in prepared.work.jobs if job.views]
    unit = prepared.manifest.shard_rows * max(math.prod(shape) for shape in shapes)
    return largest + UNITS_IN_FLIGHT * unit


def _seconds_per_image(prepared: Prepared, job: Job, batches: BatchEncoder) -> float:
    segment, encoder = job.segments[0], prepared.encoders[job.camera].frozen
    count = min(batches.batch_size, segment.stop - segment.start)
    frames = prepared.dataset.frames(segment.demo, job.camera, segment.offset, segment.offset + count)
    frames = frames[np.arange(batches.batch_size) % count]
    batches(encoder, frames)
    started = time.perf_counter()
    for _ in range(TIMED_BATCHES):
        batches(encoder, frames[: batches.batch_size])
    return (time.perf_counter() - started) / (TIMED_BATCHES * batches.batch_size)
