"""Finds cameras that are black, or show one frame, during a whole demo: faults of rendering or recording."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import h5py
import numpy as np

from cache_pipeline.demos.layouts.robomimic import READ_ERRORS, DemoInfo

MOST_DEMOS = 1000
"""Number of demos that are checked, spread over the file."""
FRAMES_AT_ONCE = 64
NAMED = 5


def still_cameras(file: h5py.File, demos: Sequence[DemoInfo], cameras: Sequence[str]) -> Iterator[str]:
    """Yields one sentence per camera that is black or frozen during whole demos, with the names of the demos.

    Compares two frames of a demo first, and reads all frames only if these are equal.
    """
    places = np.unique(np.linspace(0, len(demos) - 1, min(len(demos), MOST_DEMOS)).round().astype(int))
    for camera in cameras:
        found: dict[str, list[str]] = {"black": [], "frozen on one frame": []}
        for demo in (demos[place] for place in places.tolist()):
            info = demo.obs.get(camera)
            if info is None or not info.is_image or not info.written or 0 in info.shape:
                continue
            state = _state(file, f"data/{demo.name}/obs/{camera}")
            if state:
                found[state].append(demo.name)
        yield from (still_sentence(camera, state, names) for state, names in found.items() if names)


def still_sentence(camera: str, state: str, names: Sequence[str]) -> str:
    """Returns the sentence that reports a black or frozen camera."""
    shown = ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
    return f"camera {camera} is {state} through {len(names)} whole demo{'s' * (len(names) > 1)} ({shown})"


def _state(file: h5py.File, path: str) -> str:
    try:
        images = file[path]
        count = len(images)
        first = images[0]
        black = not first.any()
        if (count < 2 and not black) or not np.array_equal(first, images[count // 2]):
            return ""
        for start in range(0, count, FRAMES_AT_ONCE):
            if not (images[start : start + FRAMES_AT_ONCE] == first).all():
                return ""
    except READ_ERRORS:
        return ""  # damaged data are reported by the code that needs them
    return "black" if black else "frozen on one frame"
