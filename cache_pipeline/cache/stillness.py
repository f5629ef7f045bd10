"""Finds cameras that are black or frozen through a whole demo, from the stored digests of their frames."""

from __future__ import annotations

import numpy as np

from cache_pipeline.cache.arrays import StoredArray
from cache_pipeline.cache.manifest import Manifest
from cache_pipeline.cache.store import Place
from cache_pipeline.cache.table import joined_spans, lengths
from cache_pipeline.errors import CacheError
from cache_pipeline.files import digest
from cache_pipeline.text import still_sentence


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
            digests = stored.spans(joined_spans(manifest.demos))
        except (CacheError, OSError):
            continue
        counts = lengths(manifest.demos)
        starts = np.cumsum(counts) - counts
        same = (digests == np.repeat(digests[starts], counts, axis=0)).all(1)
        still = np.logical_and.reduceat(same, starts)
        dark = still & (digests[starts] == black).all(1)
        for state, chosen in (("black", dark), ("frozen on one frame", still & ~dark & (counts > 1))):
            found[state] += [manifest.demos[number].name for number in np.flatnonzero(chosen).tolist()]
        sentences += [still_sentence(camera, state, names) for state, names in found.items() if names]
    return tuple(sentences)
