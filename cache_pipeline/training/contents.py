"""What a run's demos hold, as digests: the run finds them again whatever files, order and names they have by then."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cache_pipeline.cache.manifest import SourceRecord
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.demos.split import Split
from cache_pipeline.errors import CheckpointError
from cache_pipeline.extract.matching import array_digest, camera_frame_digests, source_records
from cache_pipeline.files import json_digest

logger = logging.getLogger("cache_pipeline")

ROWS = ("actions", "rewards", "dones")
READERS = 4

Known = Mapping[tuple[SourceRecord, str], str]


class Contents:
    """Digests of all frames, low-dim obs and actions of demos, the same for a cache and for its files.

    Those of a cache are in its manifest. Those of files are taken by reading every frame once, unless an earlier run
    recorded them and the file has its recorded size and time.

    Args:
        data: a cache or a dataset.
        cameras, low_dim: what of a demo is counted, besides actions, rewards and dones.
        known: (file, demo) → digest that an earlier run recorded.
    """

    def __init__(
        self, data: FeatureCache | Dataset, cameras: Sequence[str], low_dim: Sequence[str], known: Known | None = None
    ) -> None:
        self._data, self._cameras = data, tuple(cameras)
        self._rows = (*ROWS, *(f"low_dim/{key}" for key in low_dim))
        self._files = source_records(data) if isinstance(data, Dataset) else data.manifest.files
        self._known, self._taken = known or {}, dict[int, str]()

    @property
    def files(self) -> tuple[SourceRecord, ...]:
        """The files as they are, or as they were when the cache was made."""
        return self._files

    def at_hand(self, number: int) -> str | None:
        """The digest of a demo if it can be had without reading frames."""
        if number not in self._taken and isinstance(self._data, FeatureCache):
            digests = self._data.demos[number].digests
            self._taken[number] = _joined({name: digests.get(name) for name in (*self._cameras, *self._rows)})
        demo = self._data.demos[number]
        return self._taken.get(number) or self._known.get((self._files[demo.file], demo.name))

    def digests(self, numbers: Sequence[int]) -> tuple[str, ...]:
        """The digests of some demos."""
        unread = [number for number in numbers if self.at_hand(number) is None]
        if unread:
            started = time.monotonic()
            with ThreadPoolExecutor(READERS, thread_name_prefix="contents") as readers:
                self._taken |= dict(zip(unread, readers.map(self._read, unread), strict=True))
            seconds = time.monotonic() - started
            logger.info("read %d demos once to know them by their content, in %.1f s", len(unread), seconds)
        return tuple(str(self.at_hand(number)) for number in numbers)

    def _read(self, number: int) -> str:
        assert isinstance(self._data, Dataset)
        rows = self._data.rows(number)
        found = {name: array_digest(rows[name]) if name in rows else None for name in self._rows}
        for camera in self._cameras:
            there = camera in self._data.cameras
            found[camera] = array_digest(camera_frame_digests(self._data, number, camera)) if there else None
        return _joined(found)


def _joined(digests: Mapping[str, str | None]) -> str:
    return json_digest(dict(digests))


def recorded_contents(run_data: Mapping[str, Any]) -> Known:
    """What run.json says of its demos: (file, demo) → digest."""
    files = [SourceRecord.from_json(value) for value in run_data.get("files", ())]
    entries = [*run_data["train"], *run_data["valid"]]
    return {(files[entry[0]], entry[1]): entry[2] for entry in entries if len(entry) > 2}


def split_of_run(data: FeatureCache | Dataset, contents: Contents, run_data: Mapping[str, Any], where: str) -> Split:
    """The split of an earlier run, its demos found by what they hold.

    Args:
        data: where the demos are to be.
        contents: of ``data``.
        run_data: what run.json of that run says of its data.
        where: that run, for messages.

    Raises:
        CheckpointError: a demo of that run is not in the data.
    """
    parts = (run_data["train"], run_data["valid"])
    if any(len(entry) < 3 for part in parts for entry in part):
        logger.warning("%s does not record what its demos hold: they are found by file number and name", where)
        keys = {(file, name): [number] for number, (file, name, *_) in enumerate(data.demos)}
        train, valid = ([_take(keys, (e[0], e[1]), e[1], data, where) for e in part] for part in parts)
    else:
        table = _by_content(data, contents, {entry[2] for part in parts for entry in part})
        train, valid = ([_take(table, e[2], e[1], data, where) for e in part] for part in parts)
    return Split(tuple(train), tuple(valid), f"the split of {where}: {len(train)} demos, {len(valid)} held out")


def _by_content(data: FeatureCache | Dataset, contents: Contents, wanted: set[str]) -> dict[Any, list[int]]:
    """Digest → demos. Frames are read only if the digests at hand are not all that is wanted."""
    numbers = range(len(data.demos))
    if not wanted <= {contents.at_hand(number) for number in numbers}:
        contents.digests(numbers)
    table: dict[Any, list[int]] = {}
    for number in numbers:
        table.setdefault(contents.at_hand(number), []).append(number)
    return table


def _take(table: dict[Any, list[int]], key: object, name: str, data: FeatureCache | Dataset, where: str) -> int:
    """The demo under a key, of several with one content the one of this name, each once."""
    found = table.get(key, [])
    if not found:
        same_name = any(demo.name == name for demo in data.demos)
        other = f"{name} there holds something else" if same_name else "no demo there has its name"
        raise CheckpointError(
            f"{name}, a demo of {where}, is not in the data ({other}); give the dataset that the run was trained on"
        )
    chosen = next((number for number in found if data.demos[number].name == name), found[0])
    found.remove(chosen)
    return chosen
