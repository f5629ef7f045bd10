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

Digests = dict[str, str | None]
"""Camera, ``actions``, ``low_dim/<key>``, … → digest; ``None`` for what the data do not have."""
Known = Mapping[tuple[SourceRecord, str], Digests]


class Contents:
    """Digests of all frames, low-dim obs and actions of demos, the same for a cache and for its files.

    Those of a cache are in its manifest. Those of files are taken by reading every frame once, unless an earlier run
    recorded them and the file has its recorded size and time.

    Args:
        data: a cache or a dataset.
        cameras, low_dim: what of a demo is counted, besides actions, rewards and dones.
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
        """The files as they are, or as they were when the cache was made."""
        return self._files

    def at_hand(self, number: int) -> Digests | None:
        """The digests of a demo if they can be had without reading frames."""
        if number not in self._taken and isinstance(self._data, FeatureCache):
            digests = self._data.demos[number].digests
            self._taken[number] = {name: digests.get(name) for name in (*self._cameras, *self._rows)}
        demo = self._data.demos[number]
        return self._taken.get(number) or self._known.get((self._files[demo.file], demo.name))

    def digests(self, numbers: Sequence[int]) -> tuple[Digests, ...]:
        """The digests of some demos."""
        unread = [number for number in numbers if self.at_hand(number) is None]
        if unread:
            started = time.monotonic()
            with ThreadPoolExecutor(READERS, thread_name_prefix="contents") as readers:
                self._taken |= dict(zip(unread, readers.map(self._read, unread), strict=True))
            seconds = time.monotonic() - started
            logger.info("read %d demos once to know them by their content, in %.1f s", len(unread), seconds)
        return tuple(self.at_hand(number) or {} for number in numbers)

    def _read(self, number: int) -> Digests:
        assert isinstance(self._data, Dataset)
        rows = self._data.rows(number)
        found: Digests = {name: array_digest(rows[name]) if name in rows else None for name in self._rows}
        for camera in self._cameras:
            there = camera in self._data.cameras
            found[camera] = array_digest(camera_frame_digests(self._data, number, camera)) if there else None
        return found


def recorded_contents(run_data: Mapping[str, Any]) -> Known:
    """What run.json says of its demos: (file, demo) → digests."""
    files = [SourceRecord.from_json(value) for value in run_data.get("files", ())]
    return {(files[file], name): digests for file, name, digests in _entries(run_data) if digests is not None}


def _entries(run_data: Mapping[str, Any]) -> list[tuple[int, str, Digests | None]]:
    """(file, name, digests) of the demos of a run; runs of earlier versions record no digests."""
    demos = [*run_data["train"], *run_data["valid"]]
    contents = run_data.get("contents", [None] * len(demos))
    if len(contents) != len(demos):
        raise CheckpointError(f"run.json is damaged: it names {len(demos)} demos and the contents of {len(contents)}")
    return [(file, name, digests) for (file, name), digests in zip(demos, contents, strict=True)]


def split_of_run(data: FeatureCache | Dataset, contents: Contents, run_data: Mapping[str, Any], where: str) -> Split:
    """The split of an earlier run, its demos found by what they hold.

    Args:
        data: where the demos are to be.
        contents: of ``data``.
        run_data: what run.json of that run says of its data.
        where: that run, for messages.

    Raises:
        CheckpointError: a demo of that run is not in the data; the message says what of it differs.
    """
    if "contents" in run_data:
        chosen = _by_content(data, contents, _entries(run_data), where)
    else:
        logger.warning("%s does not record what its demos hold: they are found by file number and name", where)
        chosen = _by_name(data, _entries(run_data), where)
    train, valid = chosen[: len(run_data["train"])], chosen[len(run_data["train"]) :]
    return Split(tuple(train), tuple(valid), f"the split of {where}: {len(train)} demos, {len(valid)} held out")


def _by_content(
    data: FeatureCache | Dataset, contents: Contents, entries: Sequence[tuple[int, str, Digests | None]], where: str
) -> list[int]:
    """The demo of each entry; frames are read only if the digests at hand are not all that is wanted."""
    numbers = range(len(data.demos))
    wanted = {_key(digests) for _, _, digests in entries}
    if not wanted <= {_key(contents.at_hand(number)) for number in numbers}:
        contents.digests(numbers)
    table: dict[str, list[int]] = {}
    for number in numbers:
        table.setdefault(_key(contents.at_hand(number)), []).append(number)
    chosen = []
    names = [name for _, name, *_ in data.demos]
    for _, name, digests in entries:
        found = table.get(_key(digests), [])
        if not found:
            raise _not_there(name, where, _difference(data, contents, name, digests or {}))
        chosen.append(next((number for number in found if names[number] == name), found[0]))
        found.remove(chosen[-1])  # each demo once, of several with one content the one of this name first
    return chosen


def _by_name(data: FeatureCache | Dataset, entries: Sequence[tuple[int, str, Digests | None]], where: str) -> list[int]:
    places = {(file, name): number for number, (file, name, *_) in enumerate(data.demos)}
    for file, name, _ in entries:
        if (file, name) not in places:
            raise _not_there(name, where, "no demo has its name")
    return [places[file, name] for file, name, _ in entries]


def _difference(data: FeatureCache | Dataset, contents: Contents, name: str, digests: Digests) -> str:
    """What of a demo is not as recorded in the demo of that name that is most like it."""
    alike = [contents.at_hand(number) or {} for number, (_, other, *_) in enumerate(data.demos) if other == name]
    if not alike:
        return "no demo has its name and none its content"
    nearest = max(alike, key=lambda found: sum(found.get(part) == digest for part, digest in digests.items()))
    differ = [part for part, digest in digests.items() if nearest.get(part) != digest]
    for part in differ:
        was = next((key for key in differ if key != part and nearest.get(part) == digests[key]), None)
        if was is not None:
            return f"its {part} is what {was} was: the two were exchanged"
    return f"its {', '.join(differ)} {'differs' if len(differ) == 1 else 'differ'}"


def _key(digests: Digests | None) -> str:
    return "" if digests is None else json_digest(digests)


def _not_there(name: str, where: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{name}, a demo of {where}, is not in the data: {why}; give the dataset that the run was trained on"
    )
