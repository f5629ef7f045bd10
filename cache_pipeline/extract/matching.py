"""Matches demos of a dataset to demos of a cache.

A file of recorded path, size and time is trusted. Other demos are matched by digests of their content, so moved and
renamed files and demos are recognised.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.cache.manifest import Manifest, SourceRecord
from cache_pipeline.cache.table import DemoRows
from cache_pipeline.demos.choice import Choice
from cache_pipeline.demos.dataset import Dataset, Demo
from cache_pipeline.demos.layouts.protocol import FileStamp, SourceFile
from cache_pipeline.demos.layouts.registry import layout_named
from cache_pipeline.demos.remote import local_path, recorded_path, stamp_of
from cache_pipeline.errors import MissingExtraError, StoreError
from cache_pipeline.files import DIGEST_BYTES, digest, typed

FRAMES_AT_ONCE = 256
logger = logging.getLogger("cache_pipeline")


class Matching(NamedTuple):
    """Result of matching a dataset with the demo table of a cache.

    Attributes:
        kept: for each demo of the dataset, its index in the demo table, or None if it must be encoded.
        added, changed, removed: names of demos.
    """

    kept: tuple[int | None, ...]
    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]


def source_records(dataset: Dataset) -> tuple[SourceRecord, ...]:
    """Returns the dataset's files as recorded in a manifest, with absolute paths."""
    return tuple(
        SourceRecord(recorded_path(path), size, time, tuple((str(p), s, t) for p, s, t in linked), *how)
        for path, size, time, linked, *how in dataset.files
    )


def recorded_dataset(manifest: Manifest) -> Dataset | None:
    """Returns the dataset that a complete cache was made from, without reading it; None unless its files are as
    recorded, by size and time."""
    if any(source_state(source) != "as recorded" for source in manifest.files):
        return None
    try:
        recorded = (manifest.asked or {})["choice"]
        choice: Choice = typed([*(recorded.get(name) for name in Choice._fields[:-1]), manifest.action_keys], Choice)
    except (KeyError, AttributeError, ValueError):  # a cache of an earlier version
        return None
    return Dataset(
        [
            SourceFile(local_path(path), size, time, tuple(FileStamp(Path(p), s, t) for p, s, t in linked), *how)
            for path, size, time, linked, *how in manifest.files
        ],
        [Demo(demo.file, demo.name, demo.length, demo.task) for demo in manifest.demos],
        cameras={camera: entry.image_shape for camera, entry in manifest.cameras.items()},
        low_dim=manifest.low_dim,
        action_dim=manifest.action_dim,
        choice=choice,
        masks=manifest.masks,
        absent=manifest.absent,
        env_args=manifest.env_args,
        render_flags=manifest.render_flags,
    )


def source_state(source: SourceRecord) -> Literal["as recorded", "changed", "gone"]:
    """Compares a source file, its linked files and the decoder of its frames with the record, by size and time."""
    if source.decoder and layout_named(source.layout).decoder() != source.decoder:
        return "changed"
    try:
        stamps = [stamp_of(path) for path in (source.path, *(item[0] for item in source.linked))]
    except (StoreError, MissingExtraError) as error:
        logger.warning("%s", error)
        return "gone"
    except OSError:
        return "gone"
    now = [stamp[1:] for stamp in stamps]
    return "as recorded" if now == [source[1:3], *(item[1:] for item in source.linked)] else "changed"


def frame_digests(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns (n, 16) blake2b digests of the bytes of each frame."""
    hexes = (digest(np.ascontiguousarray(frame).data.cast("B")) for frame in frames)
    return np.frombuffer(b"".join(map(bytes.fromhex, hexes)), np.uint8).reshape(-1, DIGEST_BYTES)


def array_digest(values: NDArray) -> str:
    """Returns the digest of an array's bytes."""
    return digest(np.ascontiguousarray(values).tobytes())


def camera_frame_digests(dataset: Dataset, demo: int, camera: str) -> NDArray[np.uint8]:
    """Returns (T, 16) digests of all frames of one demo, reading a part at a time."""
    length = dataset.demos[demo].length
    pieces = [
        frame_digests(dataset.frames(demo, camera, start, min(start + FRAMES_AT_ONCE, length)))
        for start in range(0, length, FRAMES_AT_ONCE)
    ]
    return np.concatenate(pieces) if pieces else np.zeros((0, DIGEST_BYTES), np.uint8)


def demo_digests(dataset: Dataset, demo: int, cameras: Iterable[str]) -> dict[str, str]:
    """Returns the digests of a demo: array or camera → digest; reads all frames of the cameras."""
    rows = {name: array_digest(values) for name, values in dataset.rows(demo).items()}
    return {**rows, **{camera: array_digest(camera_frame_digests(dataset, demo, camera)) for camera in cameras}}


Equal = Callable[[int, Mapping[str, str]], bool]
"""Whether a demo of a dataset has the contents that a cache recorded."""


def _comparison(dataset: Dataset, manifest: Manifest) -> Equal:
    cameras = [camera for camera in manifest.cameras if camera in dataset.cameras]
    digests = cache(lambda demo: demo_digests(dataset, demo, cameras))

    def equal(demo: int, recorded: Mapping[str, str]) -> bool:
        found = digests(demo) if dataset.demos[demo].length else None
        return found is not None and all(found[name] == recorded[name] for name in found if name in recorded)

    return equal


def match_demos(manifest: Manifest | None, dataset: Dataset, *, deep: bool = False) -> Matching:
    """Finds each demo of the dataset in the demo table.

    Args:
        manifest: the current manifest of the cache, or None.
        dataset: the dataset.
        deep: read every frame again, also of files with recorded size and time.
    """
    if manifest is None:
        names = tuple(demo.name for demo in dataset.demos)
        return Matching((None,) * len(names), names, (), ())
    equal = _comparison(dataset, manifest)
    kept: list[int | None] = [None] * len(dataset.demos)
    changed: set[int] = set()
    for demo, old, trusted in _same_place(manifest, dataset):
        same_length = dataset.demos[demo].length == manifest.demos[old].length
        if same_length and ((trusted and not deep) or equal(demo, manifest.demos[old].digests)):
            kept[demo] = old
        else:
            changed.add(demo)
    _match_by_content(manifest, dataset, equal, kept)
    return _describe(manifest, dataset, kept, changed)


def _same_place(manifest: Manifest, dataset: Dataset) -> Iterator[tuple[int, int, bool]]:
    """Yields demos with recorded path and name: (demo, index in the table, whether the file is unchanged)."""
    recorded = {source.path: (number, source) for number, source in enumerate(manifest.files)}
    table = {(demo.file, demo.name): index for index, demo in enumerate(manifest.demos)}
    sources = source_records(dataset)
    for number, demo in enumerate(dataset.demos):
        source = sources[demo.file]
        file, old = recorded.get(source.path, (-1, None))
        index = table.get((file, demo.name))
        if index is not None:
            yield number, index, source == old


def _match_by_content(manifest: Manifest, dataset: Dataset, equal: Equal, kept: list[int | None]) -> None:
    free: dict[int, list[int]] = {}
    for index in sorted(set(range(len(manifest.demos))) - set(kept)):
        free.setdefault(manifest.demos[index].length, []).append(index)
    for demo, found in enumerate(kept):
        candidates = free.get(dataset.demos[demo].length, []) if found is None else []
        same_name = [i for i in candidates if manifest.demos[i].name == dataset.demos[demo].name]
        for index in [*same_name, *(i for i in candidates if i not in same_name)]:
            if equal(demo, manifest.demos[index].digests):
                kept[demo] = index
                candidates.remove(index)
                break


def _describe(manifest: Manifest, dataset: Dataset, kept: list[int | None], changed: set[int]) -> Matching:
    names, still = {demo.name for demo in dataset.demos}, set(kept)
    new = [number for number, old in enumerate(kept) if old is None]
    gone: list[DemoRows] = [d for index, d in enumerate(manifest.demos) if index not in still]
    replaced = [number for number in new if number in changed]
    # A demo of the same name at another path counts as changed: its file was moved and edited.
    moved = {demo.name for demo in gone}
    replaced += [n for n in new if n not in changed and dataset.demos[n].name in moved]
    return Matching(
        tuple(kept),
        tuple(dataset.demos[n].name for n in new if n not in replaced),
        tuple(dataset.demos[n].name for n in replaced),
        tuple(demo.name for demo in gone if demo.name not in names),
    )
