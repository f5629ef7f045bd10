"""Finds cameras that are black or frozen through a whole demo, from the stored digests of their frames."""

from __future__ import annotations

import numpy as np

from cache_pipeline.cache.arrays import StoredArray
from cache_pipeline.cache.manifest import Manifest
from cache_pipeline.cache.store import Place
from cache_pipeline.errors import CacheError
from cache_pipeline.files import digest
from cache_pipeline.text import listed, shortened

NAMED = 5


def still_cameras(place: Place, manifest: Manifest) -> tuple[str, ...]:
    """Returns one sentence for each camera that is black or frozen through whole demos, with the names of the demos.

    Frames with equal digests count as equal. Unreadable digests are skipped; the integrity check reports them.
    """
    sentences: list[str] = []
    if not manifest.demos:
        return ()
    for camera, entry in manifest.cameras.items():
        black = np.frombuffer(bytes.fromhex(digest(bytes(int(np.prod(entry.image_shape))))), np.uint8)
        found: dict[str, list[str]] = {"black": [], "frozen on one frame": []}
        try:
            stored = StoredArray(place, f"frame_digests/{camera}")
            digests = stored.spans([(demo.row, demo.row + demo.length) for demo in manifest.demos])
        except (CacheError, OSError):
            continue
        ends = np.cumsum([demo.length for demo in manifest.demos])
        for demo, part in zip(manifest.demos, np.split(digests, ends[:-1]), strict=True):
            still = len(part) > 0 and bool((part == part[0]).all())
            if still and np.array_equal(part[0], black):
                found["black"].append(demo.name)
            elif still and len(part) > 1:
                found["frozen on one frame"].append(demo.name)
        sentences += [_sentence(camera, state, names) for state, names in found.items() if names]
    return tuple(sentences)


def _sentence(camera: str, state: str, names: list[str]) -> str:
    count = f"{len(names)} whole demo{'s' * (len(names) > 1)}"
    return f"camera {shortened(camera)} is {state} through {count} ({listed(names, limit=NAMED)})"
