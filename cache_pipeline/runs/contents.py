"""Digests of a run's demos, by which the run finds them again if files, order or names have changed."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from cache_pipeline.cache.manifest import SourceRecord
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.cache.table import DemoRows
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.demos.split import Split
from cache_pipeline.errors import CheckpointError
from cache_pipeline.extract.matching import demo_digests, source_records
from cache_pipeline.files import json_digest
from cache_pipeline.runs.record import DataRecord, DemoRecord, Digests

logger = logging.getLogger("cache_pipeline")

ROWS = ("actions", "rewards", "dones")
READERS = 4

Known = Mapping[tuple[SourceRecord, str], Digests]


class Contents:
    """Digests of all frames, low-dim obs and actions of demos, equal for a cache and for its files.

    Digests of a cache are in its manifest. Digests of files are computed by reading every frame once, unless an earlier
    run recorded them and the file still has the recorded size and time.

    Args:
        data: a cache or a dataset.
        cameras, low_dim: the keys to include besides actions, rewards and dones.
        known: (file, demo) → digests that an earlier run recorded.
    """

    def __init__(
        self, data: FeatureCache | Dataset, cameras: Sequence[str], low_dim: Sequence[str], known: Known | None = None
    ) -> None:
        self._data, self._cameras = data, tuple(cameras)
        self._rows = (*ROWS, *(f"low_dim/{key}" for key in low_dim))
        self._files = source_records(data) if isinstance(data, Dataset) else data.manifest.files
        self._known, self._taken = known or {}, dict[int, Digests]()

    @property
    def files(self) -> tuple[SourceRecord, ...]:
        """The files as they are now; those of a cache as they were at extraction."""
        return self._files

    def at_hand(self, number: int) -> Digests | None:
        """Returns the digests of a demo if they are known without reading frames, else None."""
        if number in self._taken:
            return self._taken[number]
        demo = self._data.demos[number]
        if not isinstance(demo, DemoRows):
            return self._known.get((self._files[demo.file], demo.name))
        self._taken[number] = {name: demo.digests.get(name) for name in (*self._cameras, *self._rows)}
        return self._taken[number]

    def digests(self, numbers: Sequence[int]) -> tuple[Digests, ...]:
        """Returns the digests of demos; reads the frames of those whose digests are unknown."""
        unread = [number for number in numbers if self.at_hand(number) is None]
        if unread:
            started = time.monotonic()
            with ThreadPoolExecutor(READERS, thread_name_prefix="contents") as readers:
                self._taken |= dict(zip(unread, readers.map(self._read, unread), strict=True))
            seconds = time.monotonic() - started
            logger.info("read %d demos once to compute their digests, in %.1f s", len(unread), seconds)
        return tuple(self.at_hand(number) or {} for number in numbers)

    def _read(self, number: int) -> Digests:
        assert isinstance(self._data, Dataset)
        found = demo_digests(self._data, number, [camera for camera in self._cameras if camera in self._data.cameras])
        return {name: found.get(name) for name in (*self._rows, *self._cameras)}


def recorded_contents(recorded: DataRecord) -> Known:
    """Returns the digests that a run recorded, by (file, demo)."""
    return {
        (recorded.files[demo.file], demo.name): demo.contents for demo in recorded.demos if demo.contents is not None
    }


def split_of_run(data: FeatureCache | Dataset, contents: Contents, recorded: DataRecord, where: str) -> Split:
    """Returns the split of an earlier run; finds its demos by their contents.

    Args:
        data: the cache or dataset in which the demos are looked up.
        contents: digests of ``data``.
        recorded: the data record of that run.
        where: name of that run, for messages.

    Raises:
        CheckpointError: a demo of that run is not in the data; the message says which part differs.
    """
    if all(demo.contents is not None for demo in recorded.demos):
        chosen = _by_content(data, contents, recorded.demos, where)
    else:
        logger.warning("%s has no digests of its demos: they are found by file number and name", where)
        chosen = _by_name(data, recorded.demos, where)
    train, valid = chosen[: len(recorded.train)], chosen[len(recorded.train) :]
    return Split(tuple(train), tuple(valid), f"the split of {where}: {len(train)} demos, {len(valid)} held out")


def _by_content(data: FeatureCache | Dataset, contents: Contents, demos: Sequence[DemoRecord], where: str) -> list[int]:
    """Returns the number of each demo; reads frames only if the known digests do not suffice."""
    numbers = range(len(data.demos))
    wanted = {_key(demo.contents) for demo in demos}
    if not wanted <= {_key(contents.at_hand(number)) for number in numbers}:
        contents.digests(numbers)
    table: dict[str, list[int]] = {}
    for number in numbers:
        table.setdefault(_key(contents.at_hand(number)), []).append(number)
    chosen = []
    names = [name for _, name, *_ in data.demos]
    for demo in demos:
        found = table.get(_key(demo.contents), [])
        if not found:
            raise _not_there(demo.name, where, _difference(data, contents, demo.name, demo.contents or {}))
        chosen.append(next((number for number in found if names[number] == demo.name), found[0]))
        found.remove(chosen[-1])  # use each demo once; among demos with equal contents prefer the one of this name
    return chosen


def _by_name(data: FeatureCache | Dataset, demos: Sequence[DemoRecord], where: str) -> list[int]:
    places = {(file, name): number for number, (file, name, *_) in enumerate(data.demos)}
    for demo in demos:
        if (demo.file, demo.name) not in places:
            raise _not_there(demo.name, where, "no demo has its name")
    return [places[demo.file, demo.name] for demo in demos]


def _difference(data: FeatureCache | Dataset, contents: Contents, name: str, digests: Digests) -> str:
    """Says which parts of a demo differ from the record, in the most similar demo of the same name."""
    alike = [contents.at_hand(number) or {} for number, (_, other, *_) in enumerate(data.demos) if other == name]
    if not alike:
        return "no demo has its name or its contents"
    nearest = max(alike, key=lambda found: sum(found.get(part) == digest for part, digest in digests.items()))
    differ = [part for part, digest in digests.items() if nearest.get(part) != digest]
    for part in differ:
        was = next((key for key in differ if key != part and nearest.get(part) == digests[key]), None)
        if was is not None:
            return f"its {part} is the recorded {was}: the two were exchanged"
    return f"its {', '.join(differ)} {'differs' if len(differ) == 1 else 'differ'}"


def _key(digests: Digests | None) -> str:
    return "" if digests is None else json_digest(digests)


def _not_there(name: str, where: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{name}, a demo of {where}, is not in the data: {why}; give the dataset that the run was trained on"
    )
