"""Finds cameras that are black, or show one frame, during a whole demo: faults of rendering or recording."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from cache_pipeline.demos.layouts.robomimic import ArrayInfo, DemoInfo
from cache_pipeline.hdf5 import READ_ERRORS, damage_as_error, open_file
from cache_pipeline.isolation import isolated, progress
from cache_pipeline.text import still_sentence

MOST_DEMOS = 1000
"""Number of demos that are checked, spread over the file."""
FRAMES_AT_ONCE = 64


def still_cameras(path: Path, demos: Sequence[DemoInfo], cameras: Sequence[str]) -> list[str]:
    """Returns one sentence per camera that is black or frozen during whole demos, with the names of the demos.

    Compares two frames of a demo first, and reads all frames only if these are equal.

    Raises:
        DatasetError: an image crashes HDF5.
    """
    places = np.unique(np.linspace(0, len(demos) - 1, min(len(demos), MOST_DEMOS)).round().astype(int))
    chosen = [demos[place] for place in places.tolist()]
    sentences: list[str] = []
    for camera in cameras:
        names = [demo.name for demo in chosen if (info := demo.obs.get(camera)) and _is_readable(info)]
        with damage_as_error(path, f"the images of {camera}"):
            found = isolated(_still_demos, path, camera, names)
        sentences += [still_sentence(camera, state, still) for state, still in found.items() if still]
    return sentences


def _is_readable(info: ArrayInfo) -> bool:
    return info.is_image and info.written and 0 not in info.shape


def _still_demos(path: Path, camera: str, demos: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"black": [], "frozen on one frame": []}
    with open_file(path) as file:
        for demo in demos:
            progress()
            if state := _state(file, f"data/{demo}/obs/{camera}"):
                found[state].append(demo)
    return found


def _state(file: h5py.File, path: str) -> str:
    try:
        images = file[path]
        count = len(images)
        first = images[0]
        black = not first.any()
        if (count < 2 and not black) or not np.array_equal(first, images[count // 2]):
            return ""
        for start in range(0, count, FRAMES_AT_ONCE):
            progress()
            if not (images[start : start + FRAMES_AT_ONCE] == first).all():
                return ""
    except READ_ERRORS:
        return ""  # damaged data are reported by the code that needs them
    return "black" if black else "frozen on one frame"
