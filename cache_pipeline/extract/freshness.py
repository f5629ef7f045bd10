"""Compares a cache with its source files before training."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from cache_pipeline.cache.manifest import UNKNOWN
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.demos.dataset import Dataset, distinct_paths
from cache_pipeline.demos.remote import recorded_path
from cache_pipeline.errors import StaleCacheError
from cache_pipeline.extract.matching import (
    Matching,
    array_digest,
    camera_frame_digests,
    match_demos,
    recorded_dataset,
    source_state,
)
from cache_pipeline.text import listed

logger = logging.getLogger("cache_pipeline")

EXTEND = "run the extract-features command of this cache again; it encodes only the difference"


def check_sources(cache: FeatureCache, datasets: Sequence[str | Path] = (), *, deep: bool = False) -> None:
    """Compares a cache with its source files.

    Compares recorded files by size and time, and reads those that differ. Missing files are logged.

    Args:
        cache: the cache.
        datasets: files that must hold exactly the demos of the cache, at any path and in any order; default: the
            recorded files that exist.
        deep: read every frame again instead of trusting size and time of files.

    Raises:
        StaleCacheError: names the file, demo, camera and frame, or filter key that differs.
        DatasetError: a named file is missing or cannot be read.
    """
    if datasets:
        _compare(cache, distinct_paths(datasets), deep=deep, whole=True)
        return
    states = {source.path: source_state(source) for source in cache.manifest.files}
    gone = [path for path, state in states.items() if state == "gone"]
    if gone:
        which = gone[0] if len(gone) == 1 else f"{gone[0]} and {len(gone) - 1} more of its {len(states)} files"
        logger.info("%s: its source %s is missing, so they are not compared", cache.path, which)
    if deep or "changed" in states.values():
        there = [path for path, state in states.items() if state != "gone"]
        if there:
            _compare(cache, there, deep=deep, whole=not gone)


def _compare(cache: FeatureCache, paths: Sequence[str | Path], *, deep: bool, whole: bool) -> None:
    """Compares the demos of files with those of a cache, in both directions.

    Args:
        whole: whether ``paths`` are all sources of the cache.
    """
    started = time.monotonic()
    known = cache.manifest.filter_key != UNKNOWN
    filter_key = cache.manifest.filter_key if known else None
    cameras, low_dim = tuple(cache.cameras), tuple(cache.low_dim)
    actions = cache.manifest.action_keys
    with Dataset.open(
        paths, cameras=cameras, low_dim_keys=low_dim, filter_key=filter_key, action_key=actions
    ) as dataset:
        matching = match_demos(cache.manifest, dataset, deep=deep)
        _check_each_file(cache, dataset, matching)
        if known:
            for new, old in enumerate(matching.kept):
                if old is None:
                    _raise_changed(cache, dataset, new)
        _check_removed(cache, dataset, matching, whole=whole)
        if whole and known:
            _check_masks(cache, dataset, matching)
    seconds = time.monotonic() - started
    logger.info("%s has the same content as its %d source files (compared in %.1f s)", cache.path, len(paths), seconds)


def _check_each_file(cache: FeatureCache, dataset: Dataset, matching: Matching) -> None:
    """Raises StaleCacheError for a file without a demo of the cache: it is another dataset."""
    for number, file in enumerate(dataset.files):
        new = [i for i, demo in enumerate(dataset.demos) if demo.file == number]
        if all(matching.kept[i] is None for i in new) and not _named_alike(cache, dataset, new):
            was = ", ".join(Path(source.path).name for source in cache.manifest.files)
            meaning = f"none of its {len(new)} demos is in {cache.path}"
            mend = "leave out --dataset to train on the cache, or extract this dataset into another cache"
            raise StaleCacheError("dataset", was, str(file.path), meaning, mend)


def _named_alike(cache: FeatureCache, dataset: Dataset, numbers: Sequence[int]) -> bool:
    """Whether a file has a recorded path: then it is a changed file, not another dataset."""
    recorded = {source.path for source in cache.manifest.files}
    return recorded_path(dataset.files[dataset.demos[numbers[0]].file].path) in recorded


def _check_removed(cache: FeatureCache, dataset: Dataset, matching: Matching, *, whole: bool) -> None:
    """Raises StaleCacheError for demos of the cache that were removed from the files."""
    read = {recorded_path(file.path) for file in dataset.files}
    unmatched = {demo.name: new for new, demo in enumerate(dataset.demos) if matching.kept[new] is None}
    for old in sorted(set(range(len(cache.demos))) - set(matching.kept)):
        demo = cache.demos[old]
        source = cache.manifest.files[demo.file].path
        if not whole and source not in read:
            continue
        if demo.name in unmatched:
            _raise_changed(cache, dataset, unmatched[demo.name])
        meaning, mend = f"{source} does not hold it any more", EXTEND
        if source not in read:
            meaning, mend = f"it came from {source}", "name all files of the cache with --dataset, or none"
        raise StaleCacheError(f"demo {demo.name}", "present", "absent", meaning, mend)


def _check_masks(cache: FeatureCache, dataset: Dataset, matching: Matching) -> None:
    """Raises StaleCacheError for filter keys whose demos differ from those in the cache: they determine the split."""
    for key in sorted({*cache.masks, *dataset.masks}):
        was = {cache.demos[old].name for old in cache.masks.get(key, ())}
        found = [matching.kept[new] for new in dataset.masks.get(key, ())]
        now = {cache.demos[old].name for old in found if old is not None}
        if sorted(cache.masks.get(key, ())) != sorted(old for old in found if old is not None):
            differ = listed(sorted(was ^ now), limit=5)
            meaning = f"its demos have changed ({differ})"
            mend = "run the extract-features command of this cache again; it records the change and encodes nothing"
            raise StaleCacheError(f"filter key {key}", f"{len(was)} demos", f"{len(now)} demos", meaning, mend)


def require_same_demos(cache: FeatureCache, dataset: Dataset, *, deep: bool = False) -> dict[int, int]:
    """Returns demo of the cache → demo of the dataset, which may have more demos.

    Args:
        cache: the cache.
        dataset: the opened source files.
        deep: read every frame again.

    Raises:
        StaleCacheError: names the first difference: demo, and camera and frame for pixels.
    """
    matching = match_demos(cache.manifest, dataset, deep=deep)
    _check_removed(cache, dataset, matching, whole=True)
    return {old: new for new, old in enumerate(matching.kept) if old is not None}


def open_sources(cache: FeatureCache) -> Dataset:
    """Opens the recorded files of a cache, with all demos under their recorded file and name.

    Raises:
        DatasetError: a file is missing or cannot be read.
        StaleCacheError: a demo has changed or moved.
    """
    dataset = recorded_dataset(cache.manifest)
    if dataset is not None:
        return dataset
    paths = [source.path for source in cache.manifest.files]
    dataset = Dataset.open(paths, cameras=tuple(cache.cameras), action_key=cache.manifest.action_keys)
    for old, new in require_same_demos(cache, dataset).items():
        was, now = cache.demos[old], dataset.demos[new]
        if (was.file, was.name) != (now.file, now.name):
            raise StaleCacheError("demo", was.name, now.name, "it has another name or file now", EXTEND)
    return dataset


def _raise_changed(cache: FeatureCache, dataset: Dataset, new: int) -> NoReturn:
    """Raises StaleCacheError with the first difference of a demo that the cache does not hold."""
    demo = dataset.demos[new]
    file = dataset.files[demo.file].path
    old = next((row for row in cache.demos if row.name == demo.name), None)
    if old is None:
        names = {row.name for row in cache.demos}
        more = [other.name for other in dataset.demos if other.file == demo.file and other.name not in names]
        meaning = f"{file} has {len(more)} demos more than the cache ({listed(more, limit=5)})"
        raise StaleCacheError(f"demo {demo.name}", "absent", "present", meaning, EXTEND)
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
