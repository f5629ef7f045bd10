"""The manifest of a cache: one JSON value with contents, origin and its own digest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from cache_pipeline.cache.layout import Segment, Unit, block_segments
from cache_pipeline.cache.table import DemoRows, DemoTable, demo_files, first_rows, joined_spans, lengths
from cache_pipeline.files import digest, json_digest, typed

FORMAT = 1
TABLES = "tables"
MANY_DEMOS = 20_000
"""Above this number of demos, their table is an object of its own, in columns."""
UNKNOWN = "?"
ACTIONS = ("actions",)


class SourceRecord(NamedTuple):
    """A source file, and the files that it links to, as (path, size, time) when their frames were last read.

    ``layout`` is the name of its layout, ``decoder`` the library that decoded its frames, if they were encoded.
    """

    path: str
    size: int
    mtime_ns: int
    linked: tuple[tuple[str, int, int], ...] = ()
    layout: str = "hdf5"
    decoder: str = ""

    def to_json(self) -> list[Any]:
        """Returns a list without the defaults at its end."""
        value: list[Any] = [*self[:3], [list(item) for item in self.linked], self.layout, self.decoder]
        defaults: tuple[Any, ...] = ("", "hdf5", [])
        for default in defaults:
            if value[-1] != default:
                break
            value.pop()
        return value

    @classmethod
    def from_json(cls, value: Any) -> SourceRecord:
        """Reads the value of ``to_json``; raises ValueError for any other value."""
        made: SourceRecord = typed(value, cls)
        return made


class CameraEntry(NamedTuple):
    """One camera of a cache.

    Attributes:
        feature_shape: (D,) or (D, h, w) at the cut.
        image_shape: (H, W, 3) of its frames.
        identity: all settings that determine the values of view 0, as opaque JSON.
        views: number of views K.
        view_spec: all settings that determine views 1 and above, as opaque JSON; None without such views.
        measured: measurements on some of its frames when it was added; they do not affect values.
    """

    feature_shape: tuple[int, ...]
    image_shape: tuple[int, int, int]
    identity: dict[str, Any]
    views: int
    view_spec: dict[str, Any] | None = None
    measured: dict[str, Any] | None = None

    def unit_identity(self, view: int) -> str:
        """Returns the digest of all settings that determine the values of one view."""
        return json_digest([self.decisive] if view == 0 else [self.decisive, self.view_spec, view])

    @property
    def decisive(self) -> dict[str, Any]:
        """Returns the identity without the name of the weights' source, which does not affect values."""
        weights = {key: item for key, item in self.identity.get("weights", {}).items() if key != "source"}
        return {**self.identity, "weights": weights}

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "feature_shape": list(self.feature_shape), "image_shape": list(self.image_shape)}


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json``."""

    shard_rows: int
    n_rows: int
    batch_size: int
    dtype: str
    cameras: dict[str, CameraEntry]
    low_dim: dict[str, tuple[int, ...]]
    action_dim: int
    files: tuple[SourceRecord, ...]
    demos: Sequence[DemoRows]
    masks: dict[str, tuple[int, ...]]
    env_args: dict[str, Any] | None = None
    render_flags: dict[str, Any] | None = None
    encoders: dict[str, str] = field(default_factory=dict)
    """Camera → path of its encoder's weights inside the cache."""
    units: dict[str, str] = field(default_factory=dict)
    """Unit name → digest of the stored bytes; the units of live rows, dead blocks left out."""
    absent: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Filter key → names of its demos that are not in the cache."""
    filter_key: str | None = None
    """The filter key whose demos were extracted; ``None`` for all demos, ``UNKNOWN`` for caches that do not say."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Path of a file inside the cache that is neither a shard nor a ledger record → digest of its bytes."""
    asked: dict[str, Any] | None = None
    """What the last extraction asked for, with what it left out: the keys ``cameras``, ``low_dim_keys`` and ``choice``.
    The same request, on files that have not changed, gives the same demos and keys."""
    action_keys: tuple[str, ...] = ACTIONS
    """The arrays of the dataset that are the actions, side by side."""
    devices: tuple[str, ...] = ()
    """Names of the devices that computed its features, as in the ledger; none in caches of earlier versions."""
    format: int = FORMAT

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the contents: equal for equal frames, encoder and views, whatever the row layout."""
        cameras = {
            name: [entry.decisive, entry.views, entry.view_spec if entry.views > 1 else None]
            for name, entry in self.cameras.items()
        }
        demos = [[demo.name, demo.length, demo.digests, demo.view_key] for demo in self.demos]
        return json_digest([self.format, self.dtype, cameras, sorted(self.low_dim), demos])

    def block_segments(self) -> dict[int, tuple[Segment, ...]]:
        """Returns the live segments of each block that has live rows."""
        return block_segments(first_rows(self.demos).tolist(), lengths(self.demos).tolist(), self.shard_rows)

    def live_blocks(self) -> list[int]:
        """Returns the blocks that have live rows, in ascending order."""
        size = self.shard_rows
        spans = joined_spans(self.demos)
        return sorted({block for start, stop in spans for block in range(start // size, -(-stop // size))})

    def unit_inputs(self, unit: Unit) -> str:
        """Returns the digest of all settings, besides frames and rows, that determine the contents of a unit."""
        if unit.kind == "features":
            return self.cameras[unit.key].unit_identity(unit.view)
        if unit.kind == "steps":
            return json_digest(["steps", self.action_dim, *(self.action_keys if self.action_keys != ACTIONS else ())])
        if unit.kind == "low_dim":
            return json_digest(["low_dim", unit.key, list(self.low_dim[unit.key])])
        if unit.kind == "rows":
            return json_digest([{key: list(shape) for key, shape in self.low_dim.items()}, self.action_dim])
        return json_digest(["frame digests"])

    def live_units(self) -> Iterator[Unit]:
        """Returns every unit that a complete cache must hold, block by block."""
        for block in self.live_blocks():
            yield Unit("steps", "", 0, block)
            for key in self.low_dim:
                yield Unit("low_dim", key, 0, block)
            for camera, entry in self.cameras.items():
                yield Unit("frames", camera, 0, block)
                for view in range(entry.views):
                    yield Unit("features", camera, view, block)

    @property
    def rows(self) -> int:
        """Number of live rows: the frames of all demos."""
        return int(lengths(self.demos).sum())

    @cached_property
    def table(self) -> tuple[str, bytes] | None:
        """Name and bytes of the object that holds the demo table in columns; None if the manifest itself holds it."""
        if len(self.demos) <= MANY_DEMOS:
            return None
        data = DemoTable.of(self.demos).to_bytes()
        return f"{TABLES}/{digest(data)}.npz", data

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON value with its own digest under ``digest``; of many demos, it names the :attr:`table`."""
        value = {
            "format": self.format,
            "fingerprint": self.fingerprint,
            "shard_rows": self.shard_rows,
            "n_rows": self.n_rows,
            "batch_size": self.batch_size,
            "dtype": self.dtype,
            "cameras": {name: entry.to_json() for name, entry in self.cameras.items()},
            "low_dim": {key: list(shape) for key, shape in self.low_dim.items()},
            "action_dim": self.action_dim,
            "files": [source.to_json() for source in self.files],
            "demos": self.table[0]
            if self.table
            else [list(demo if demo.task is not None else demo[:-1]) for demo in self.demos],
            "masks": {key: list(demos) for key, demos in self.masks.items()},
            "absent": {key: list(names) for key, names in self.absent.items()},
            "filter_key": self.filter_key,
            "env_args": self.env_args,
            "render_flags": self.render_flags,
            "encoders": self.encoders,
            "units": self.units,
            "metadata": self.metadata,
            "asked": self.asked,
            **({"action_keys": list(self.action_keys)} if self.action_keys != ACTIONS else {}),
            "devices": list(self.devices),
        }
        return {**value, "digest": json_digest(value)}

    @classmethod
    def from_json(cls, value: Any, table: DemoTable | None = None) -> Manifest:
        """Reads the value of :meth:`to_json`; raises ValueError for any other value, or one with a wrong digest.

        Args:
            table: the demo table that the value names, if it names one.
        """
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
        rest = {key: item for key, item in value.items() if key != "digest"}
        if not digest_fits(rest, value):
            raise ValueError("its digest does not match its contents")
        cameras = {
            name: [entry.get(item) for item in CameraEntry._fields]
            for name, entry in typed(rest.get("cameras"), dict[str, dict[str, Any]]).items()
        }
        demos = typed(rest.get("demos"), tuple[DemoRows, ...]) if table is None else ()
        made: Manifest = typed({"filter_key": UNKNOWN, **rest, "cameras": cameras, "demos": ()}, cls)
        made = replace(made, demos=demos if table is None else table)
        if isinstance(rest.get("fingerprint"), str):
            made.__dict__["fingerprint"] = rest["fingerprint"]
        made._check()
        return made

    def _check(self) -> None:
        """Raises ValueError for sizes and numbers that do not fit together."""
        starts, counts = first_rows(self.demos), lengths(self.demos)
        shapes = [*(entry.feature_shape for entry in self.cameras.values()), *self.low_dim.values()]
        sizes = [self.shard_rows, self.batch_size, self.action_dim, *(side for shape in shapes for side in shape)]
        if min(sizes) < 1 or (counts < 1).any():
            raise ValueError("a size in it is not positive")
        if (starts < 0).any() or (starts > self.n_rows - counts).any():
            raise ValueError("a demo in it has rows outside the cache")
        files = demo_files(self.demos)
        members = np.array([number for numbers in self.masks.values() for number in numbers], np.int64)
        if ((files < 0) | (files >= len(self.files))).any() or ((members < 0) | (members >= len(self.demos))).any():
            raise ValueError("it names a file or demo that it does not list")


def digest_fits(rest: dict[str, Any], value: dict[str, Any]) -> bool:
    """Whether ``value`` has the digest of ``rest``, its other items."""
    try:
        return value.get("digest") == json_digest(rest)
    except (ValueError, TypeError, RecursionError):
        return False
