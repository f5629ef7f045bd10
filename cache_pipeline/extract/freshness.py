"""Whether a cache still holds what its dataset holds, for those who train on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.errors import StaleCacheError
from cache_pipeline.extract.matching import array_digest, camera_frame_digests, match_demos
from cache_pipeline.extract.staleness import check_camera

EXTEND = "run the extract-features command of this cache again, which encodes just what differs"


def open_for_training(
    cache_path: str | Path,
    datasets: Sequence[str | Path] | None = None,
    *,
    filter_key: str | None = None,
    identities: Mapping[str, Mapping[str, Any]] | None = None,
    deep: bool = False,
) -> FeatureCache:
    """Opens a cache and holds it against what is to be trained on.

    Args:
        cache_path: the cache.
        datasets: source files that it must hold; None asks nothing of them, so that none need be there.
        filter_key: only the demos of this filter key need be in the cache.
        identities: camera → ``FrozenEncoder.identity`` that its features must come from.
        deep: read every frame again instead of trusting size and time of files.

    Raises:
        NotACacheError, IncompleteCacheError, CorruptCacheError: there is no sound cache.
        StaleCacheError: names the demo (and camera and frame) or the item of the identity that differs.
    """
    cache = FeatureCache(cache_path)
    for camera, identity in (identities or {}).items():
        if camera in cache.cameras:
            entry = cache.cameras[camera]
            check_camera(camera, entry, entry._replace(identity=dict(identity)))
    if datasets:
        dataset = Dataset.open(
            [Path(path) for path in datasets],
            cameras=tuple(cache.cameras),
            low_dim_keys=tuple(cache.low_dim),
            filter_key=filter_key,
        )
        require_same_demos(cache, dataset, only_those_of_dataset=True, deep=deep)
    return cache


def require_same_demos(
    cache: FeatureCache, dataset: Dataset, *, only_those_of_dataset: bool = False, deep: bool = False
) -> dict[int, int]:
    """Demo of the cache → demo of the dataset.

    Args:
        cache: the cache.
        dataset: its source.
        only_those_of_dataset: every demo of the dataset must be in the cache; else every demo of the cache must be in
            the dataset.
        deep: read every frame again.

    Raises:
        StaleCacheError: names the demo that differs, and the camera and frame where one pixel does.
    """
    matching = match_demos(cache.manifest, dataset, deep=deep)
    found = {old: new for new, old in enumerate(matching.kept) if old is not None}
    if only_those_of_dataset:
        for new, old in enumerate(matching.kept):
            if old is None:
                _raise_changed(cache, dataset, new)
        return found
    unmatched = {demo.name: new for new, demo in enumerate(dataset.demos) if matching.kept[new] is None}
    for old, demo in enumerate(cache.demos):
        if old not in found:
            if demo.name in unmatched:
                _raise_changed(cache, dataset, unmatched[demo.name])
            raise StaleCacheError(f"demo {demo.name}", "there", "absent", "the dataset holds it no longer", EXTEND)
    return found


def _raise_changed(cache: FeatureCache, dataset: Dataset, new: int) -> NoReturn:
    """Names what differs in a demo of the dataset that the cache does not hold."""
    demo = dataset.demos[new]
    file = dataset.files[demo.file].path
    old = next((row for row in cache.demos if row.name == demo.name), None)
    if old is None:
        raise StaleCacheError(f"demo {demo.name}", "absent", "there", f"{file} has a demo more", EXTEND)
    if old.length != demo.length:
        raise StaleCacheError(f"demo {demo.name} length", old.length, demo.length, f"it has changed in {file}", EXTEND)
    rows = slice(old.row, old.row + old.length)
    for camera in cache.cameras:
        stored, now = cache.frame_digests(camera, rows), camera_frame_digests(dataset, new, camera)
        frames = np.flatnonzero((stored != now).any(axis=1))
        if len(frames):
            at = int(frames[0])
            field = f"demo {demo.name} camera {camera} frame {at}"
            meaning = f"{len(frames)} of its {old.length} frames have changed in {file}"
            raise StaleCacheError(field, stored[at].tobytes().hex(), now[at].tobytes().hex(), meaning, EXTEND)
    for name, values in dataset.rows(new).items():
        was, now_is = old.digests.get(name), array_digest(values)
        if was != now_is:
            raise StaleCacheError(f"demo {demo.name} {name}", was, now_is, f"it has changed in {file}", EXTEND)
    raise StaleCacheError(f"demo {demo.name}", "one demo", "two", f"{file} has two demos with these contents", EXTEND)
