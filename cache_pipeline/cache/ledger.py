"""One record per finished unit, with digests of inputs and output. Only a record proves that a unit was written."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from cache_pipeline.cache.layout import Unit
from cache_pipeline.files import json_digest, read_json, typed, write_json

LOOKED_AT = 1000  # most records to try when looking for a valid one


class RecordedSegment(NamedTuple):
    """Consecutive frames of one demo inside a unit.

    Attributes:
        file, size, mtime_ns: the source file as it was when the frames were read.
        demo, offset: name of the demo, and index of its frame at ``start``.
        start, stop: rows of the cache.
        view_key: seed of the demo's view parameters.
        digest: of the frames' digests, or of the low-dim rows.
    """

    file: str
    size: int
    mtime_ns: int
    demo: str
    offset: int
    start: int
    stop: int
    view_key: str
    digest: str


class LedgerRecord(NamedTuple):
    """A finished unit.

    Attributes:
        unit: its name.
        rows: first row and the row after the last.
        segments: the frames that were read for it.
        inputs: digest of the camera's identity and view.
        output: digest of the stored array's bytes, dead rows included.
        seconds: time spent encoding.
    """

    unit: str
    rows: tuple[int, int]
    segments: tuple[RecordedSegment, ...]
    inputs: str
    output: str
    seconds: float


def record_file(path: Path, unit: Unit) -> Path:
    """Returns the path of a unit's record."""
    return path / "ledger" / f"{unit.name}.json"


def write_record(path: Path, unit: Unit, record: LedgerRecord) -> None:
    """Records a unit as finished, atomically; its shard must be on disk already."""
    value = {**record._asdict(), "segments": [list(segment) for segment in record.segments]}
    file = record_file(path, unit)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {**value, "digest": json_digest(value)})


def read_record(path: Path, unit: Unit) -> LedgerRecord | None:
    """Reads the record of a unit; returns None if it is missing or damaged, since the unit is unfinished either way."""
    record = _read(record_file(path, unit))
    return record if record is not None and record.unit == unit.name else None


def has_records(path: Path) -> bool:
    """Whether a folder holds a valid record of any unit. Only a cache has one, even if its manifest is damaged."""
    files = islice((path / "ledger").rglob("*.json"), LOOKED_AT)
    return any(_read(file) is not None for file in files)


def _read(file: Path) -> LedgerRecord | None:
    try:
        value: Any = read_json(file)
        claimed = value.pop("digest")
        if claimed != json_digest(value):
            return None
        record: LedgerRecord = typed([value[name] for name in LedgerRecord._fields], LedgerRecord)
        return record
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def strike_record(path: Path, unit: Unit) -> None:
    """Removes a unit's record, so that the next extraction writes the unit again."""
    record_file(path, unit).unlink(missing_ok=True)
