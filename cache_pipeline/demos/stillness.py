"""Finds cameras that are black or show one frame during a whole demo, or show the same as another camera."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.demos.layouts.protocol import ArrayInfo, DemoInfo, Layout, SourceFile
from cache_pipeline.demos.layouts.registry import layout_named
from cache_pipeline.errors import DatasetError
from cache_pipeline.files import digest
from cache_pipeline.hdf5 import damage_as_error
from cache_pipeline.isolation import isolated, progress
from cache_pipeline.text import listed, shortened, still_sentence

COMPARED_DEMOS = 16
"""Number of demos in which cameras are compared with each other."""
MOST_DEMOS = 1000
"""Number of demos that are checked, spread over the file."""
FRAMES_AT_ONCE = 64


def still_cameras(source: SourceFile, demos: Sequence[DemoInfo], cameras: Sequence[str]) -> list[str]:
    """Returns one sentence per camera that is black or frozen during whole demos, with the names of the demos.

    Compares two frames of a demo first, and reads all frames only if these are equal.

    Raises:
        DatasetError: an image crashes HDF5.
    """
    places = np.unique(np.linspace(0, len(demos) - 1, min(len(demos), MOST_DEMOS)).round().astype(int))
    chosen = [demos[place] for place in places.tolist()]
    sentences: list[str] = []
    for camera in cameras:
        names = [
            (demo.name, info.shape[0], info.frame)
            for demo in chosen
            if (info := demo.obs.get(camera)) and _is_readable(info) and info.frame
        ]
        with damage_as_error(source.path, f"the images of {camera}"):
            found = isolated(_still_demos, source, camera, names)
        sentences += [still_sentence(camera, state, still) for state, still in found.items() if still]
    return sentences


def duplicate_cameras(source: SourceFile, demos: Sequence[DemoInfo], cameras: Sequence[str]) -> list[str]:
    """Returns one sentence per group of cameras whose first and middle frames are equal in all demos looked at.

    Raises:
        DatasetError: an image crashes HDF5.
    """
    places = np.unique(np.linspace(0, len(demos) - 1, min(len(demos), COMPARED_DEMOS)).round().astype(int))
    chosen = []
    for demo in (demos[place] for place in places.tolist()):
        there = [(camera, info.frame) for camera in cameras if (info := demo.obs.get(camera)) and _is_readable(info)]
        chosen.append((demo.name, demo.length, [(camera, size) for camera, size in there if size is not None]))
    with damage_as_error(source.path, "its images"):
        groups = isolated(_equal_cameras, source, chosen)
    return [
        f"cameras {' and '.join(map(shortened, group)) if len(group) == 2 else listed(group, limit=5)} show the same "
        f"frames in {len(chosen)} of {len(chosen)} demos looked at"
        for group in groups
    ]


def _equal_cameras(
    source: SourceFile, demos: Sequence[tuple[str, int, Sequence[tuple[str, tuple[int, int, int]]]]]
) -> list[list[str]]:
    """Returns the groups of cameras with equal frames; black frames are equal to none."""
    layout, seen = layout_named(source.layout), dict[str, tuple[str, ...]]()
    try:
        for demo, length, cameras in demos:
            for camera, size in cameras:
                progress()
                middle = length // 2
                with suppress(DatasetError):  # damaged data are reported by the code that needs them
                    pair = layout.frames(source, camera, size, [(demo, 0, 1), (demo, middle, middle + 1)])
                    seen[camera] = (*seen.get(camera, ()), digest(pair.tobytes()) if pair.any() else camera)
    finally:
        layout.close([source])
    groups: dict[tuple[str, ...], list[str]] = {}
    for camera, frames in seen.items():
        groups.setdefault(frames, []).append(camera)
    return [group for group in groups.values() if len(group) > 1]


def _is_readable(info: ArrayInfo) -> bool:
    return info.is_image and info.written and 0 not in info.shape


def _still_demos(
    source: SourceFile, camera: str, demos: Sequence[tuple[str, int, tuple[int, int, int]]]
) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"black": [], "frozen on one frame": []}
    layout = layout_named(source.layout)
    try:
        for demo, length, size in demos:
            progress()
            if state := _state(layout, source, camera, demo, length, size):
                found[state].append(demo)
    finally:
        layout.close([source])
    return found


def _state(layout: Layout, source: SourceFile, camera: str, demo: str, length: int, size: tuple[int, int, int]) -> str:
    def read(start: int, stop: int) -> NDArray[np.uint8]:
        return layout.frames(source, camera, size, [(demo, start, stop)])

    try:
        first = read(0, 1)
        black = not first.any()
        if (length < 2 and not black) or not np.array_equal(first, read(length // 2, length // 2 + 1)):
            return ""
        for start in range(0, length, FRAMES_AT_ONCE):
            progress()
            if not (read(start, min(start + FRAMES_AT_ONCE, length)) == first).all():
                return ""
    except DatasetError:
        return ""  # damaged data are reported by the code that needs them
    return "black" if black else "frozen on one frame"
