"""One record per finished unit, with digests of inputs and output. Only a record proves that a unit was written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from cache_pipeline.cache.layout import Unit
from cache_pipeline.cache.store import Place, store_at
from cache_pipeline.cache.store_protocol import Store
from cache_pipeline.files import json_bytes, json_digest, typed

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


class MadeWith(NamedTuple):
    """What computed a unit's features.

    Attributes:
        device: ``cpu``, or the name of the GPU.
        torch, torchvision: versions of the libraries.
        precision: precision of the encoder.
    """

    device: str
    torch: str
    torchvision: str
    precision: str


class LedgerRecord(NamedTuple):
    """A finished unit.

    Attributes:
        unit: its name.
        rows: first row and the row after the last.
        segments: the frames that were read for it.
        inputs: digest of the camera's identity and view.
        output: digest of the stored array's bytes, dead rows included.
        seconds: time spent encoding.
        made_with: of features; None for other units and in records of earlier versions.
    """

    unit: str
    rows: tuple[int, int]
    segments: tuple[RecordedSegment, ...]
    inputs: str
    output: str
    seconds: float
    made_with: MadeWith | None = None


def record_name(unit: Unit) -> str:
    """Returns the name of a unit's record inside the cache."""
    return f"ledger/{unit.name}.json"


def write_record(place: Place, unit: Unit, record: LedgerRecord) -> None:
    """Records a unit as finished, atomically; its shard must be stored already."""
    value = {**record._asdict(), "segments": [list(segment) for segment in record.segments]}
    value["made_with"] = record.made_with and record.made_with._asdict()
    store_at(place).write(record_name(unit), json_bytes({**value, "digest": json_digest(value)}))


def read_record(place: Place, unit: Unit) -> LedgerRecord | None:
    """Reads the record of a unit; returns None if it is missing or damaged, since the unit is unfinished either way."""
    record = _read(store_at(place), record_name(unit))
    return record if record is not None and record.unit == unit.name else None


def record_names(place: Place) -> Iterator[str]:
    """Yields the names of all records, valid or not."""
    return (name for name, _ in store_at(place).sizes("ledger/") if name.endswith(".json"))


def has_records(place: Place) -> bool:
    """Whether a valid record of any unit is stored. Only a cache has one, even if its manifest is damaged."""
    store = store_at(place)
    return any(_read(store, name) is not None for name in islice(record_names(store), LOOKED_AT))


def _read(store: Store, name: str) -> LedgerRecord | None:
    try:
        value: Any = json.loads(store.read(name))
        claimed = value.pop("digest")
        if claimed != json_digest(value):
            return None
        made_with = value.pop("made_with", None)
        fields = [value[name] for name in LedgerRecord._fields[:-1]]
        read = None if made_with is None else [made_with[name] for name in MadeWith._fields]
        record: LedgerRecord = typed([*fields, read], LedgerRecord)
        return record
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def strike_record(place: Place, unit: Unit) -> None:
    """Removes a unit's record, so that the next extraction writes the unit again."""
    store_at(place).delete(record_name(unit))
