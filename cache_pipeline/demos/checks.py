"""Checks of a dataset file. Each problem is one sentence with demo, key and frame; the caller adds the file name.

``Dataset.open`` raises the first problem; ``inspect_dataset`` reports all problems.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cache_pipeline.demos.choice import Choice, choose_from
from cache_pipeline.demos.layouts.protocol import ACTIONS, ArrayInfo, DemoInfo, FileInfo, demo_order
from cache_pipeline.demos.split import absent_demos
from cache_pipeline.errors import DatasetError, available
from cache_pipeline.text import listed

logger = logging.getLogger("cache_pipeline")

# Keys of each arm: robot0_eef_pos, robot1_eef_pos, robot0_right_eef_pos, left_eef_pos, eef_pos.
PROPRIOCEPTION = re.compile(r"((?:robot\d+_)?(?:left_|right_)?)(eef_pos|eef_quat|gripper_q?pos)")
# Obs keys that hold the whole proprioception, in LeRobot datasets.
STATES = ("observation.state", "state")
PRIVILEGED = "object"
# Renderings that are no rgb images although some have their form; they are cameras only if they are named.
RENDERINGS = re.compile(r"(?:.*[_./])?(?:depths?|normals?|segmentation|semantic|instance|seg|masks?)(?:[_./].*)?")
DEFAULT_ACTIONS = (ACTIONS,)
CAMERA_FORMS = "uint8 (T, H, W, 3) or another form of 8-bit images"


class Wanted(NamedTuple):
    """The obs keys and the action arrays that will be read."""

    cameras: tuple[str, ...]
    low_dim: tuple[str, ...]
    actions: tuple[str, ...] = DEFAULT_ACTIONS


def find_cameras(demos: Iterable[DemoInfo]) -> tuple[str, ...]:
    """Returns every obs key that is an rgb or grey image in at least one demo; not depth, normals or segmentation."""
    images = {key for demo in demos for key, info in demo.obs.items() if info.is_image}
    return tuple(sorted(key for key in images if not RENDERINGS.fullmatch(key)))


def find_low_dim(demos: Iterable[DemoInfo]) -> tuple[str, ...]:
    """Returns every obs key that holds one or more numbers per step in at least one demo."""
    return tuple(sorted({key for demo in demos for key, info in demo.obs.items() if info.is_low_dim}))


def default_low_dim(demos: Iterable[DemoInfo], with_cameras: bool) -> tuple[str, ...]:
    """Returns position, orientation and gripper keys of every arm, or the state; without such keys, every low-dim key.

    The names are those of robomimic and robosuite. ``object`` (object poses, unknown to a real robot) is left out if
    there are cameras.
    """
    found = [key for key in find_low_dim(demos) if key != PRIVILEGED or not with_cameras]
    arms = {key: match.groups() for key in found if (match := PROPRIOCEPTION.fullmatch(key))}
    usual = sorted(arms, key=lambda key: (demo_order(arms[key][0]), arms[key][1]))
    usual = usual or [key for key in STATES if key in found][:1]
    return tuple([*usual, *(key for key in found if key == PRIVILEGED)] if usual else found)


def choice_of(demos: Sequence[DemoInfo], wanted: Wanted) -> Choice:
    """Returns the keys of demos that are used and those that are left out."""
    cameras, low_dim = find_cameras(demos), find_low_dim(demos)
    everything = sorted({key for demo in demos for key in demo.obs})
    return Choice(
        wanted.cameras,
        wanted.low_dim,
        choose_from(cameras, wanted.cameras),
        choose_from(low_dim, wanted.low_dim),
        choose_from(everything, (*cameras, *low_dim, *wanted.cameras, *wanted.low_dim)),
        choose_from(sorted({key for demo in demos for key in action_keys(demo)}), wanted.actions),
        wanted.actions,
    )


def action_keys(demo: DemoInfo) -> tuple[str, ...]:
    """Returns the arrays of a demo that could be actions."""
    return (*((ACTIONS,) if ACTIONS in demo.arrays else ()), *demo.other_actions)


def with_actions(demo: DemoInfo, keys: tuple[str, ...]) -> DemoInfo:
    """Returns the demo with the arrays ``keys``, side by side, as its actions; without actions if it lacks one."""
    if keys == DEFAULT_ACTIONS:
        return demo
    rest = {path: info for path, info in demo.arrays.items() if path != ACTIONS}
    parts = [demo.arrays[key] for key in keys if key in demo.arrays]
    if len(parts) < len(keys) or not all(part.shape for part in parts):
        return demo._replace(arrays=rest)
    uneven = [f"{key} {part.shape[0]}" for key, part in zip(keys, parts, strict=True)]
    trouble = next((part.trouble for part in parts if part.trouble), "")
    if len({part.shape[0] for part in parts}) > 1:
        trouble = f"are arrays of several lengths ({', '.join(uneven)})"
    odd = next((part.dtype for part in parts if part.dtype.kind not in "fiu"), None)
    joined = ArrayInfo(
        (parts[0].shape[0], sum(part.width for part in parts)),
        odd if odd is not None else np.result_type(*(part.dtype for part in parts)),
        None,
        "none",
        sum(part.stored_bytes for part in parts),
        all(part.written for part in parts),
        trouble,
    )
    return demo._replace(arrays={**rest, **{key: demo.arrays[key] for key in keys}, ACTIONS: joined})


def select_demos(info: FileInfo, filter_key: str | None) -> tuple[DemoInfo, ...]:
    """Returns the demos of a filter key, or all demos without one. Warns if the key names demos not in the file.

    Raises:
        DatasetError: the key does not exist, is empty, or none of its demos is in the file.
    """
    if filter_key is None:
        return info.demos
    if filter_key not in info.masks:
        raise DatasetError(f"{info.path} has no filter key {filter_key!r}; {available(info.masks, filter_key)}")
    absent, present = info.absent(filter_key), set(info.present(filter_key))
    if not present:
        why = f"names {len(absent)} demos, and none of them is in the file" if absent else "names no demos"
        raise DatasetError(f"filter key {filter_key!r} of {info.path} {why}; {available(info.masks)}")
    if absent:
        logger.warning("%s: %s", info.path, absent_demos(filter_key, absent, len(present) + len(absent)))
    return tuple(demo for demo in info.demos if demo.name in present)


def skipped_demos(info: FileInfo) -> str:
    """Returns one sentence that names the demos without steps."""
    count = f"{len(info.empty)} of {len(info.empty) + len(info.demos)} demos"
    return f"{count} have no steps and are skipped ({listed(info.empty, limit=5)})"


def structure_problems(demos: Sequence[DemoInfo], wanted: Wanted) -> Iterator[str]:
    """Yields missing, incomplete or wrongly shaped arrays. Reads metadata only."""
    for demo in demos:
        yield from _action_problems(demo)
        for camera in wanted.cameras:
            yield from _obs_problems(demo, camera, "camera")
        for key in wanted.low_dim:
            yield from _obs_problems(demo, key, "low-dim key")
        for path in ("rewards", "dones"):
            if path in demo.arrays and demo.arrays[path].trouble:
                yield f"{demo.name}: {path} {demo.arrays[path].trouble}"
            elif path in demo.arrays and demo.arrays[path].shape != (demo.length,):
                yield f"{demo.name}: {path} is {demo.arrays[path]}, but there are {demo.length} actions"


def _action_problems(demo: DemoInfo) -> Iterator[str]:
    actions = demo.arrays.get("actions")
    if actions is None:
        yield f"{demo.name} has no actions" + (
            f"; --action-key chooses others; {available(demo.other_actions)}" if demo.other_actions else ""
        )
    elif len(actions.shape) != 2 or actions.dtype.kind not in "fiu" or actions.shape[1] == 0:
        yield f"{demo.name}: actions is {actions}; it must be numbers (T, action dim)"
    elif demo.length == 0:
        yield f"{demo.name} has no steps: its actions have length 0"
    elif actions.trouble:
        yield f"{demo.name}: actions {actions.trouble}"
    elif not actions.written:
        yield f"{demo.name}: actions is incomplete: part of it is not in the file; write the file again"


def _obs_problems(demo: DemoInfo, key: str, kind: str) -> Iterator[str]:
    info = demo.obs.get(key)
    if info is None:
        yield f"{demo.name} lacks the {kind} {key!r}; {available(demo.obs, key)}"
    elif kind == "camera" and not info.is_image:
        yield f"{demo.name}: obs/{key} is {info}; a camera must be {CAMERA_FORMS}{_image_advice(info)}"
    elif kind != "camera" and not info.is_numbers:
        yield f"{demo.name}: obs/{key} is {info}; a low-dim key must be numbers (T, …), not an image"
    elif info.shape[0] != demo.length:
        yield f"{demo.name}: obs/{key} has {info.shape[0]} frames, but there are {demo.length} actions"
    elif 0 in info.shape[1:]:
        yield f"{demo.name}: obs/{key} is {info}: empty frames"
    elif info.trouble:
        yield f"{demo.name}: obs/{key} {info.trouble}"
    elif not info.written:
        yield f"{demo.name}: obs/{key} is incomplete: part of it is not in the file; write the file again"


def _image_advice(info: ArrayInfo) -> str:
    if info.dtype.kind == "f":
        return ": store images as uint8 0–255"
    if info.dtype.kind in "OSV":
        return ": its first row is no JPEG or PNG image"
    return ""


def unused_images(demos: Sequence[DemoInfo]) -> Iterator[str]:
    """Yields obs that have the shape of rgb images but the wrong dtype; beside cameras they may be surface normals."""
    if find_cameras(demos):
        return
    for demo in demos:
        for key, info in demo.obs.items():
            if len(info.shape) == 4 and not info.is_image and 3 in (info.shape[1], info.shape[3]):
                yield (
                    f"{demo.name}: obs/{key} is {info}, not uint8 (T, H, W, 3){_image_advice(info)}, "
                    "or name the cameras to use"
                )


def agreement_problems(demos: Iterable[DemoInfo], wanted: Wanted) -> Iterator[str]:
    """Yields image sizes, widths and action dims that differ from those of the first demo that has the key."""
    first: dict[str, tuple[str, tuple[int, ...]]] = {}
    for demo in demos:
        for path in ("actions", *(f"obs/{key}" for key in (*wanted.cameras, *wanted.low_dim))):
            if path in demo.arrays:
                shape = demo.arrays[path].step_shape
                name, expected = first.setdefault(path, (demo.name, shape))
                if shape != expected:
                    yield f"{demo.name}: {path} is {shape} per step, but {expected} in {name}"


def number_paths(demo: DemoInfo, low_dim: Iterable[str], actions: Sequence[str] = DEFAULT_ACTIONS) -> tuple[str, ...]:
    """Returns the arrays of a demo that hold numbers and can be read: actions, rewards, dones and some low-dim keys."""
    return tuple(
        path
        for path in (*actions, "rewards", "dones", *(f"obs/{key}" for key in low_dim))
        if (info := demo.arrays.get(path)) is not None and info.dtype.kind in "fiub" and info.shape and info.written
    )
