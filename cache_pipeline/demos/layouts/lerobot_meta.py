"""Reads the folder ``meta/`` of a LeRobot dataset: features, episodes and their files, and tasks.

v2.0, v2.1    meta/info.json, episodes.jsonl, tasks.jsonl              one parquet file and one video per episode
v3.0          meta/info.json, episodes/**/*.parquet, tasks.parquet     files hold many episodes
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from cache_pipeline.errors import DatasetError, MissingExtraError, install_command
from cache_pipeline.files import typed
from cache_pipeline.isolation import progress

INFO = "meta/info.json"
PER_EPISODE, SHARED = ("v2.0", "v2.1"), ("v3.0",)
VERSIONS = (*PER_EPISODE, *SHARED)
# A place in a path template, such as {episode_index:06d}.
PLACE = re.compile(r"\{(\w+)(?::0?(\d{1,2})d)?\}")
IMAGE_TYPES = ("video", "image")
NUMBER_TYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "bool")


class Feature(NamedTuple):
    """One entry of ``features``; ``depth``: a video of depth, which is no rgb image."""

    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    depth: bool

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) that the dataset declares; its videos and images decide."""
        if len(self.shape) != 3:
            return 0, 0
        first = self.names[:1] in (("channel",), ("channels",)) or (
            self.shape[0] in (1, 3) and self.shape[2] not in (1, 3)
        )
        return (self.shape[1], self.shape[2]) if first else (self.shape[0], self.shape[1])


class Clip(NamedTuple):
    """The place of an episode in a video file: it begins ``start`` seconds after the file's first frame."""

    file: str
    start: float


class Episode(NamedTuple):
    """One episode; ``data`` is its parquet file, ``clips`` maps video features to its videos."""

    number: int
    length: int
    tasks: tuple[str, ...]
    data: str
    clips: dict[str, Clip]


class Meta(NamedTuple):
    """The contents of ``meta/``."""

    version: str
    fps: float
    robot: str
    features: dict[str, Feature]
    episodes: tuple[Episode, ...]
    splits: dict[str, tuple[int, ...]]

    @property
    def cameras(self) -> dict[str, Feature]:
        """Features that hold images, depth included."""
        return {key: feature for key, feature in self.features.items() if feature.dtype in IMAGE_TYPES}


def parquet() -> Any:
    """Imports ``pyarrow.parquet``; raises MissingExtraError if it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError(f"LeRobot datasets need pyarrow ({error}): {install_command('lerobot')}") from error
    return pyarrow.parquet


def read_meta(folder: Path) -> Meta:
    """Reads ``meta/``.

    Raises:
        DatasetError: another version, or entries that cannot be used.
        OSError, ValueError, KeyError, TypeError: damaged files.
    """
    info = _json_object((folder / INFO).read_text(encoding="utf-8"))
    version = str(info.get("codebase_version"))
    if version not in VERSIONS:
        raise DatasetError(
            f"{folder} is a LeRobot dataset of version {version[:20]}, but {', '.join(VERSIONS)} are read; "
            "convert it with lerobot"
        )
    features = {key: _feature(value) for key, value in typed(info["features"], dict[str, dict[str, Any]]).items()}
    videos = [key for key, feature in features.items() if feature.dtype == "video"]
    read = _episodes_of_v3 if version in SHARED else _episodes_of_v2
    episodes = sorted(read(folder, info, videos), key=lambda episode: episode.number)
    if len({episode.number for episode in episodes}) < len(episodes):
        raise DatasetError(f"{folder}: meta/ lists an episode twice; copy or download it again")
    fps = typed(info["fps"], float)
    if not 0 < fps < 1e6:
        raise DatasetError(f"{folder}: {INFO} has fps {fps}; it must be positive")
    splits = dict(_splits(info.get("splits"), [episode.number for episode in episodes]))
    return Meta(version, fps, str(info.get("robot_type") or "unknown"), features, tuple(episodes), splits)


def _json_object(text: str) -> dict[str, Any]:
    value: dict[str, Any] = typed(json.loads(text), dict[str, Any])
    return value


def _feature(value: dict[str, Any]) -> Feature:
    names = value.get("names")
    plain = tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()
    video = {**(value.get("info") or {}), **(value.get("video_info") or {})}
    shape: tuple[int, ...] = typed(value["shape"], tuple[int, ...])
    if any(not 0 <= side <= 1 << 20 for side in shape):
        raise ValueError(f"a feature has the shape {shape}")
    return Feature(str(value["dtype"]), shape, plain, bool(video.get("video.is_depth_map")))


def _episodes_of_v2(folder: Path, info: dict[str, Any], videos: Sequence[str]) -> Iterator[Episode]:
    size = max(1, typed(info.get("chunks_size", 1000), int))
    for line in (folder / "meta/episodes.jsonl").read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        progress()
        value = _json_object(line)
        index, length = typed(value["episode_index"], int), typed(value["length"], int)
        places = {"episode_index": index, "episode_chunk": index // size}
        clips = {key: Clip(_path(info["video_path"], places, key), 0.0) for key in videos}
        tasks = typed(value.get("tasks") or [], tuple[str, ...])
        yield Episode(index, length, tasks, _path(info["data_path"], places), clips)


def _episodes_of_v3(folder: Path, info: dict[str, Any], videos: Sequence[str]) -> Iterator[Episode]:
    own = ["episode_index", "tasks", "length", "data/chunk_index", "data/file_index"]
    parts = ("chunk_index", "file_index", "from_timestamp")
    columns = [*own, *(f"videos/{key}/{part}" for key in videos for part in parts)]
    files = sorted((folder / "meta/episodes").rglob("*.parquet"))
    if not files:
        raise DatasetError(f"{folder} has no parquet file in meta/episodes; copy or download it again")
    for file in files:
        progress()
        table = parquet().read_table(file, columns=columns, partitioning=None)
        for row in table.to_pylist():
            clips = {}
            for key in videos:
                chunk, number, start = (row[f"videos/{key}/{part}"] for part in parts)
                clips[key] = Clip(
                    _path(info["video_path"], {"chunk_index": chunk, "file_index": number}, key), float(start)
                )
            places = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
            tasks = typed(row["tasks"] or [], tuple[str, ...])
            length = typed(row["length"], int)
            yield Episode(typed(row["episode_index"], int), length, tasks, _path(info["data_path"], places), clips)


def _path(template: Any, places: dict[str, int], video_key: str = "") -> str:
    """Fills in a path template of ``info.json``; raises ValueError for one that leaves the folder."""

    def value(match: re.Match[str]) -> str:
        name, width = match[1], int(match[2] or 0)
        return video_key if name == "video_key" else str(int(places[name])).zfill(width)

    path = PLACE.sub(value, typed(template, str))
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\0" in path:
        raise ValueError(f"the path {path[:100]!r} leads out of the dataset")
    return path


def _splits(value: Any, episodes: Sequence[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the filter keys of ``splits``, such as {"train": "0:90", "val": "90:100"}; other forms are left out."""
    for name, span in (value if isinstance(value, dict) else {}).items():
        found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", span) if isinstance(span, str) else None
        if found is not None:
            key = "valid" if name in ("val", "validation", "valid") else str(name)
            yield key, tuple(index for index in episodes if int(found[1]) <= index < int(found[2]))
