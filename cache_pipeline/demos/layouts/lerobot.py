"""The layout of LeRobot datasets, v2.0, v2.1 and v3.0: a folder of parquet files with videos, or with encoded images.

    meta/info.json, …    data/**/*.parquet    videos/**/*.mp4

Episodes are demos, features of images and videos are cameras, ``observation.state`` and other numbers are low-dim obs,
``action`` are the actions, ``next.reward`` and ``next.done`` rewards and dones. Names stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.demos.layouts import encoded, video
from cache_pipeline.demos.layouts.lerobot_files import EPISODE, FRAME, TIME, Folder, damage_named, episode_name
from cache_pipeline.demos.layouts.lerobot_meta import INFO, NUMBER_TYPES, Episode, Feature, Meta
from cache_pipeline.demos.layouts.protocol import ACTIONS, ArrayInfo, DemoInfo, FileInfo, FileStamp, SourceFile
from cache_pipeline.errors import DatasetError
from cache_pipeline.hdf5 import damage_as_error
from cache_pipeline.isolation import isolated, progress
from cache_pipeline.text import listed

NAME = "lerobot"
# Columns that address rows.
ADDRESSES = (TIME, FRAME, EPISODE, "index", "task_index")
STEP_COLUMNS = {"rewards": "next.reward", "dones": "next.done"}
ACTION_COLUMNS = ("action", "actions")


def detect(path: Path) -> bool:
    """Whether a folder has the file ``meta/info.json``."""
    return path.is_dir() and (path / INFO).is_file()


def decoder() -> str:
    """Returns the libraries that decode videos and images, with their versions."""
    return ", ".join(name for name in (video.decoder(), encoded.decoder()) if name)


def scan(path: Path) -> FileInfo:
    """Reads ``meta/`` and what the first files state, but no frames, in the child process.

    Raises:
        DatasetError: ``meta/`` is damaged or of another version, or the dataset has no episode with steps.
        MissingExtraError: pyarrow or PyAV is not installed.
    """
    path = Path(path).expanduser()
    with damage_as_error(path):
        return isolated(_scan, path)


def _scan(path: Path) -> FileInfo:
    stamp = FileStamp.of(path)
    folder = Folder(path)
    try:
        meta, problems = folder.meta, list[str]()
        full = [episode for episode in meta.episodes if episode.length > 0]
        if not full:
            raise DatasetError(f"{path} holds no episode with steps; collect some first")
        cameras = dict(_cameras(folder, full, problems))
        sizes = _stored_sizes(path, full, cameras)
        demos = tuple(_demo(meta, episode, cameras, sizes) for episode in full)
        names = {episode.number: episode_name(episode) for episode in full}
        return FileInfo(
            path=path,
            size=stamp.size,
            mtime_ns=stamp.mtime_ns,
            demos=demos,
            masks={key: tuple(names[i] for i in span if i in names) for key, span in meta.splits.items()},
            env_args=None,
            render_flags=None,
            total=None,
            problems=tuple(problems),
            notes=tuple(_notes(meta)),
            empty=tuple(episode_name(episode) for episode in meta.episodes if episode.length <= 0),
            layout=NAME,
            decoder=decoder() if cameras else "",
            kind=f"LeRobot {meta.version}, {meta.fps:g} fps, robot {meta.robot[:40]}",
        )
    finally:
        folder.close()


def _cameras(folder: Folder, episodes: Sequence[Episode], problems: list[str]) -> Iterator[tuple[str, ArrayInfo]]:
    """Yields the cameras as arrays of no steps, with the size and codec of their first video or image."""
    first = episodes[0]
    for key, feature in folder.meta.cameras.items():
        progress()
        trouble, (height, width), kind = "", feature.image_size, feature.dtype
        try:
            with damage_named(folder.path, f"the first {feature.dtype} of {key}"):
                if feature.dtype == "video":
                    stream = video.read_stream(folder.path / first.clips[key].file)
                    (height, width), kind = stream[1:3], f"{stream.codec} video"
                else:
                    header = encoded.read_header(next(folder.images(key, first, 0, 1)))
                    if header is None:
                        raise ValueError("it is no JPEG or PNG image of 8 bits")
                    (height, width), kind = header[1:], header.format
        except DatasetError as error:
            trouble = f"cannot be read: {error}"
        depth = feature.depth
        shape, dtype = (0, height, width, 1 if depth else 3), np.dtype(np.uint16 if depth else np.uint8)
        yield key, ArrayInfo(shape, dtype, None, kind, 0, not trouble, trouble)


def _stored_sizes(path: Path, episodes: Sequence[Episode], cameras: dict[str, ArrayInfo]) -> dict[str, float]:
    """Returns video file → bytes per frame, from the size of the file and the steps of its episodes."""
    steps = Counter[str]()
    for episode in episodes:
        for key in cameras:
            if key in episode.clips:
                steps[episode.clips[key].file] += episode.length
    return {file: (path / file).stat().st_size / count for file, count in steps.items() if (path / file).is_file()}


def _demo(meta: Meta, episode: Episode, cameras: dict[str, ArrayInfo], sizes: dict[str, float]) -> DemoInfo:
    arrays: dict[str, ArrayInfo] = {}
    for key, info in cameras.items():
        clip = episode.clips.get(key)
        lost = clip is not None and clip.file not in sizes
        trouble = f"is a video in {clip.file}, which is missing: put the file back" if lost and clip else info.trouble
        stored = round(sizes.get(clip.file, 0) * episode.length) if clip is not None else 0
        shape = (episode.length, *info.shape[1:])
        arrays[f"obs/{key}"] = info._replace(shape=shape, stored_bytes=stored, trouble=trouble, written=not trouble)
    others = []
    for key, feature in meta.features.items():
        if feature.dtype not in NUMBER_TYPES or key in ADDRESSES:
            continue
        path = _path(meta, key)
        if path == key and key != ACTIONS:
            others.append(key)
        arrays[path] = _numbers_info(path, feature, episode.length)
    task = "; ".join(episode.tasks) or None
    return DemoInfo(episode_name(episode), arrays, episode.length, other_actions=tuple(others), task=task)


def _path(meta: Meta, column: str) -> str:
    """Returns the path of a column in a demo: its own name for further actions."""
    if column == _action_column(meta):
        return ACTIONS
    for path, name in STEP_COLUMNS.items():
        if column == name:
            return path
    return column if "action" in column and not column.startswith("observation") else f"obs/{column}"


def _action_column(meta: Meta) -> str:
    return next((name for name in ACTION_COLUMNS if name in meta.features), ACTION_COLUMNS[0])


def _numbers_info(path: str, feature: Feature, length: int) -> ArrayInfo:
    dtype, shape = np.dtype(feature.dtype), feature.shape
    if path in STEP_COLUMNS and shape in ((), (1,)):
        return ArrayInfo((length,), dtype, None, "parquet", 0, True)
    width = int(np.prod(shape, dtype=np.int64))
    flat = (length, width) if not path.startswith("obs/") or len(shape) < 2 else (length, *shape)
    return ArrayInfo(flat, dtype, None, "parquet", width * dtype.itemsize * length, True)


def _notes(meta: Meta) -> Iterator[str]:
    depth = [key for key, feature in meta.cameras.items() if feature.depth]
    if depth:
        yield f"videos of depth are left out: {listed(depth)}"
    left = [key for key, feature in meta.features.items() if feature.dtype not in (*NUMBER_TYPES, "video", "image")]
    if left:
        yield f"features that are neither images nor numbers are left out: {listed(left)}"


def numbers(source: SourceFile, demo: str, path: str) -> NDArray | None:
    """Reads one array of a demo in its own type; None if it is not there."""
    folder = _folder(source)
    column = {ACTIONS: _action_column(folder.meta), **STEP_COLUMNS}.get(path, path.removeprefix("obs/"))
    values = folder.column(folder.episodes[demo], column)
    if values is None:
        return None
    if path in STEP_COLUMNS:
        return values.reshape(len(values)) if values.size == len(values) else values
    declared = folder.meta.features[column].shape if column in folder.meta.features else values.shape[1:]
    width = int(np.prod(declared, dtype=np.int64))
    if values.size != len(values) * width:
        with damage_named(source.path, f"{column} of {demo}"):
            raise ValueError(f"it has {values.size} numbers for {len(values)} steps of {width}")
    return values.reshape(len(values), width)


def frames(
    source: SourceFile, camera: str, size: tuple[int, ...], segments: Sequence[tuple[str, int, int]]
) -> NDArray[np.uint8]:
    """Reads the frames of segments (demo, start, stop) into a new uint8 (n, H, W, 3) array, in this order.

    Videos stay open and are decoded in order: frames that follow those of the last call are reached without a seek.
    """
    out = np.empty((sum(stop - start for _, start, stop in segments), *size), np.uint8)
    ends = np.cumsum([stop - start for _, start, stop in segments]).tolist()
    parts = [out[end - (stop - start) : end] for end, (_, start, stop) in zip(ends, segments, strict=True)]
    _folder(source).read_frames(camera, segments, parts)
    return out


_opened: dict[SourceFile, Folder] = {}


def _folder(source: SourceFile) -> Folder:
    """Returns the open dataset; raises DatasetError if it has changed since it was scanned."""
    if source not in _opened:
        source.check_unchanged()
        _opened[source] = Folder(source.path)
    return _opened[source]


def close(sources: Sequence[SourceFile]) -> None:
    """Closes datasets; they open again on the next read."""
    for source in sources:
        if (folder := _opened.pop(source, None)) is not None:
            folder.close()


def findings(source: SourceFile, demos: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns problems and notes of rows, timestamps and videos: lengths that differ, and dropped frames."""
    folder, problems, dropped = _folder(source), list[str](), list[str]()
    for demo in demos:
        progress()
        episode = folder.episodes[demo]
        frame = folder.column(episode, FRAME)
        if frame is not None and not np.array_equal(frame, np.arange(episode.length)):
            problems.append(f"{demo}: frame_index is not 0 to {episode.length - 1} in order; write the episode again")
        steps = np.diff(folder.times(episode, 0, episode.length))
        gaps = np.flatnonzero(np.abs(steps - 1 / folder.meta.fps) > video.TOLERANCE_S)
        if len(gaps):
            at = int(gaps[0])
            dropped.append(f"{demo} {steps[at]:.4g} s between frames {at} and {at + 1}")
    problems += _short_videos(folder, [folder.episodes[demo] for demo in demos])
    notes = []
    if dropped:
        some = listed(dropped, limit=3)
        notes.append(
            f"timestamps of {len(dropped)} demos are not {1 / folder.meta.fps:.4g} s apart, as if frames were dropped "
            f"({some})"
        )
    return problems, notes


def _short_videos(folder: Folder, episodes: Sequence[Episode]) -> Iterator[str]:
    """Yields the videos that state fewer frames than there are steps."""
    steps: dict[tuple[str, str], int] = {}
    for episode in episodes:
        for key, clip in episode.clips.items():
            steps[key, clip.file] = steps.get((key, clip.file), 0) + episode.length
    for (key, file), count in steps.items():
        progress()
        if folder.meta.features[key].depth:
            continue
        with damage_named(folder.path / file, f"the video of {key}"):
            stated = video.read_stream(folder.path / file).frames
        if 0 < stated < count:
            yield f"obs/{key}: {file} has {stated} frames for {count} steps; copy or download it again"
