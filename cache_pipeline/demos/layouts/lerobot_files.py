"""Reads parquet files and videos of a LeRobot dataset, in the child process of :mod:`cache_pipeline.isolation`."""

from __future__ import annotations

import itertools
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.demos.layouts import encoded
from cache_pipeline.demos.layouts.lerobot_meta import Episode, Meta, parquet, read_meta
from cache_pipeline.demos.layouts.protocol import segment_in_words
from cache_pipeline.demos.layouts.video import Video
from cache_pipeline.errors import LIMITS, CachePipelineError, DatasetError
from cache_pipeline.hdf5 import READ_ERRORS
from cache_pipeline.isolation import progress

THREADS = 4
MOST_VIDEOS, MOST_TABLES, MOST_IMAGES = 32, 8, 8
# What PyAV, pyarrow and our own checks raise for damaged bytes, besides errors of pyarrow without a builtin base.
DAMAGE = (*READ_ERRORS, EOFError, IndexError, OverflowError, MemoryError, AttributeError, ArithmeticError, struct.error)
EPISODE, FRAME, TIME = "episode_index", "frame_index", "timestamp"

Key = TypeVar("Key")
Item = TypeVar("Item")


@contextmanager
def damage_named(path: Path, what: str) -> Iterator[None]:
    """Converts what damaged files raise to DatasetError; limits of the system stay OSError."""
    try:
        yield
    except CachePipelineError:
        raise
    except Exception as error:
        known = isinstance(error, DAMAGE) or type(error).__module__.startswith(("pyarrow", "av"))
        if not known or (isinstance(error, OSError) and error.errno in LIMITS):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DatasetError(f"{path}: {what} cannot be read ({reason}); copy or download it again") from error


Wanted = tuple[tuple[str, int, int], NDArray[np.float64], NDArray[np.uint8]]
"""A segment, the times of its frames in a video, and where they go."""


class Rows(NamedTuple):
    """The numbers of one parquet file: column → one array; ``spans``: episode → (first row, row after the last)."""

    columns: dict[str, NDArray]
    spans: dict[int, tuple[int, int]]


class Folder:
    """One dataset with what is open of it: tables, images and videos, those used last.

    Raises:
        DatasetError: from every method, for damaged or missing files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with damage_named(path, "its folder meta"):
            self.meta: Meta = read_meta(path)
        self.episodes = {episode_name(episode): episode for episode in self.meta.episodes}
        self._tables = _Recent[str, Rows](MOST_TABLES)
        self._images = _Recent[tuple[str, str, int], list[Any]](MOST_IMAGES)
        self._videos = _Recent[str, Video](MOST_VIDEOS, lambda video: video.close())
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="decode")

    def close(self) -> None:
        self._videos.clear()
        self._pool.shutdown()

    def column(self, episode: Episode, name: str) -> NDArray | None:
        """Returns the rows (T, …) of one column in an episode; None without such a column."""
        with damage_named(self.path / episode.data, f"{name} of {episode_name(episode)}"):
            rows = self._tables.get(episode.data, lambda: self._read_rows(episode.data))
            if name not in rows.columns:
                return None
            start, stop = rows.spans.get(episode.number, (0, 0))
            if stop - start != episode.length:
                raise ValueError(f"the file has {stop - start} of its {episode.length} rows")
            return rows.columns[name][start:stop]

    def times(self, episode: Episode, start: int, stop: int) -> NDArray[np.float64]:
        """Returns the times of frames in seconds since the episode began, as the dataset states them."""
        times = self.column(episode, TIME)
        whole = np.arange(episode.length) / self.meta.fps if times is None else times.astype(np.float64)
        return whole[start:stop]

    def read_frames(
        self, camera: str, segments: Sequence[tuple[str, int, int]], parts: Sequence[NDArray[np.uint8]]
    ) -> None:
        """Reads segments (episode name, start, stop) of a camera into ``parts``, each (n, H, W, 3)."""
        if self.meta.features[camera].dtype == "image":
            for segment, part in zip(segments, parts, strict=True):
                self._decode_images(camera, segment, part)
            return
        by_file: dict[str, list[Wanted]] = {}
        for segment, part in zip(segments, parts, strict=True):
            episode = self.episodes[segment[0]]
            clip = episode.clips[camera]
            times = clip.start + self.times(episode, *segment[1:])
            by_file.setdefault(clip.file, []).append((segment, times, part))
        jobs = [self._pool.submit(self._decode_video, camera, file, wanted) for file, wanted in by_file.items()]
        for job in jobs:
            job.result()

    def _decode_video(
        self,
        camera: str,
        file: str,
        wanted: Sequence[Wanted],
    ) -> None:
        with (
            damage_named(self.path / file, f"the video of {camera}"),
            self._videos.using(file, lambda: Video(self.path / file)) as video,
        ):
            for segment, times, part in wanted:
                with damage_named(self.path / file, segment_in_words(camera, segment)):
                    video.read(times, part)

    def _decode_images(self, camera: str, segment: tuple[str, int, int], part: NDArray[np.uint8]) -> None:
        name, start, stop = segment
        episode = self.episodes[name]
        with damage_named(self.path / episode.data, segment_in_words(camera, segment)):
            jobs = [
                self._pool.submit(encoded.decode, data, image, start + i)
                for i, (data, image) in enumerate(zip(self.images(camera, episode, start, stop), part, strict=True))
            ]
            for job in jobs:
                job.result()
                progress()

    def images(self, camera: str, episode: Episode, start: int, stop: int) -> Iterator[bytes]:
        """Yields the encoded images of frames [start, stop) of an episode."""
        first, last = self._tables.get(episode.data, lambda: self._read_rows(episode.data)).spans[episode.number]
        if last - first != episode.length:
            raise ValueError(f"the file has {last - first} of its {episode.length} rows")
        file = parquet().ParquetFile(self.path / episode.data)
        begin = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            low, high = max(first + start - begin, 0), min(first + stop - begin, count)
            if low < high:
                progress()
                rows = self._images.get((episode.data, camera, group), partial(_image_rows, file, group, camera))
                for row in rows[low:high]:
                    yield self._image(row)
            begin += count

    def _image(self, row: Any) -> bytes:
        """Returns the bytes of one value of an image column: bytes, or else the path of a file."""
        if isinstance(row, bytes):
            return row
        data, path = (row or {}).get("bytes"), (row or {}).get("path")
        if data is not None:
            return bytes(data)
        if not isinstance(path, str) or not path or Path(path).is_absolute() or ".." in Path(path).parts:
            raise ValueError("an image has neither bytes nor a path in the dataset")
        return (self.path / path).read_bytes()

    def _read_rows(self, data: str) -> Rows:
        progress()
        file = parquet().ParquetFile(self.path / data)
        images = set(self.meta.cameras)
        names = [field.name for field in file.schema_arrow if field.name not in images]
        table = file.read(columns=names)
        progress()
        columns = {}
        for name in names:
            if (values := _as_numpy(table[name])) is not None:
                columns[name] = values
        return Rows(columns, _spans(columns[EPISODE]))


def episode_name(episode: Episode) -> str:
    return f"episode_{episode.number}"


def _spans(episodes: NDArray) -> dict[int, tuple[int, int]]:
    """Returns the first run of rows of each episode."""
    cuts = [0, *(np.flatnonzero(np.diff(episodes)) + 1).tolist(), len(episodes)]
    spans: dict[int, tuple[int, int]] = {}
    for start, stop in itertools.pairwise(cuts):
        if start < stop:
            spans.setdefault(int(episodes[start]), (start, stop))
    return spans


def _as_numpy(column: Any) -> NDArray | None:
    """Converts a column of numbers, or of lists of numbers of one size, to (T, …); None for other types."""
    import pyarrow

    values, sides = column.combine_chunks(), list[int]()
    if isinstance(values, pyarrow.ChunkedArray):
        values = pyarrow.concat_arrays(values.chunks)
    while hasattr(values.type, "value_type") and pyarrow.types.is_nested(values.type):
        inner = values.flatten()
        sides.append(len(inner) // len(values) if len(values) else 0)
        if len(inner) != len(values) * sides[-1] or values.null_count:
            return None
        values = inner
    kinds = pyarrow.types
    if not (kinds.is_integer(values.type) or kinds.is_floating(values.type) or kinds.is_boolean(values.type)):
        return None
    found: NDArray = values.to_numpy(zero_copy_only=False)
    return found.reshape(len(column), *sides) if found.dtype.kind in "fiub" else None


def _image_rows(file: Any, group: int, camera: str) -> list[Any]:
    rows: list[Any] = file.read_row_group(group, columns=[camera])[camera].to_pylist()
    return rows


class _Recent(Generic[Key, Item]):
    """The items used last, at most ``most``; ``close`` is called with those that are dropped. Safe in threads."""

    def __init__(self, most: int, close: Callable[[Item], None] = lambda item: None) -> None:
        self._most, self._close, self._lock = most, close, Lock()
        self._items: OrderedDict[Key, Item] = OrderedDict()

    def get(self, key: Key, make: Callable[[], Item]) -> Item:
        """Returns an item, made now if it is not here."""
        with self.using(key, make) as item:
            return item

    @contextmanager
    def using(self, key: Key, make: Callable[[], Item]) -> Iterator[Item]:
        """Takes an item out while it is used, so that no other thread closes it; it is dropped after an error."""
        with self._lock:
            item = self._items.pop(key, None)
        item = make() if item is None else item
        try:
            yield item
        except BaseException:
            self._close(item)
            raise
        with self._lock:
            self._items[key] = item
            dropped = [self._items.popitem(last=False)[1] for _ in range(len(self._items) - self._most)]
        for other in dropped:
            self._close(other)

    def clear(self) -> None:
        """Closes all items."""
        while self._items:
            self._close(self._items.popitem()[1])
