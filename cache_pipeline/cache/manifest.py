"""What a cache is and what made it: one JSON value that carries its own digest and is written last.

``pending.json`` has the same form and stands beside it while units are being written. A folder with a pending manifest
alone is an unfinished cache; with both, a complete cache whose extension is unfinished.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cache_pipeline.cache.layout import Segment, Unit, block_segments
from cache_pipeline.cache.ledger import has_records
from cache_pipeline.errors import CacheError, CorruptCacheError, IncompleteCacheError, NotACacheError
from cache_pipeline.files import NOT_ALLOWED, json_digest, read_json, sync_folder, write_json

FORMAT = 1
MANIFEST = "manifest.json"
PENDING = "pending.json"
UNKNOWN = "?"
STORE_DTYPES = ("float16", "float32")


class SourceRecord(NamedTuple):
    """A source file as it was when its frames were last read, and those that it reads by links: (path, size, time)."""

    path: str
    size: int
    mtime_ns: int
    linked: tuple[tuple[str, int, int], ...] = ()

    def to_json(self) -> list[Any]:
        """A list, without ``linked`` where there is none."""
        return [*self[:3], [list(item) for item in self.linked]] if self.linked else list(self[:3])

    @classmethod
    def from_json(cls, value: Any) -> SourceRecord:
        """The inverse of ``to_json``."""
        path, size, mtime_ns, *linked = value
        return cls(path, size, mtime_ns, tuple((p, s, t) for p, s, t in linked[0]) if linked else ())


class CameraEntry(NamedTuple):
    """One camera of a cache.

    Attributes:
        feature_shape: (D,) or (D, h, w) at the cut.
        image_shape: (H, W, 3) of its frames.
        identity: everything that decides the values of view 0, as opaque JSON.
        views: number of views K.
        view_spec: everything that decides the views from 1 on, as opaque JSON; None when there are none.
        measured: what was measured on some of its frames when it was added; no part of what decides values.
    """

    feature_shape: tuple[int, ...]
    image_shape: tuple[int, int, int]
    identity: dict[str, Any]
    views: int
    view_spec: dict[str, Any] | None = None
    measured: dict[str, Any] | None = None

    def unit_identity(self, view: int) -> str:
        """Digest of what decides the values of one view."""
        return json_digest([self.decisive] if view == 0 else [self.decisive, self.view_spec, view])

    @property
    def decisive(self) -> dict[str, Any]:
        """The identity without the name of the weights' source, which decides nothing."""
        weights = {key: item for key, item in self.identity.get("weights", {}).items() if key != "source"}
        return {**self.identity, "weights": weights}


class DemoRows(NamedTuple):
    """One line of the demo table.

    Attributes:
        file: index into ``Manifest.files``.
        name: its name in that file.
        length: frames.
        row: first row in every array of the cache.
        digests: camera → digest of its frames, and ``rows`` → digest of its low-dim obs and actions.
        view_key: what its view parameters are drawn from; its first name, kept when it is renamed.
    """

    file: int
    name: str
    length: int
    row: int
    digests: dict[str, str]
    view_key: str


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
    demos: tuple[DemoRows, ...]
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
    format: int = FORMAT

    @property
    def fingerprint(self) -> str:
        """Digest of what the cache holds: the same for the same frames, encoder and views, wherever its rows lie."""
        cameras = {
            name: [entry.decisive, entry.views, entry.view_spec if entry.views > 1 else None]
            for name, entry in self.cameras.items()
        }
        demos = [[demo.name, demo.length, demo.digests, demo.view_key] for demo in self.demos]
        return json_digest([self.format, self.dtype, cameras, sorted(self.low_dim), demos])

    def block_segments(self) -> dict[int, tuple[Segment, ...]]:
        """The live segments of every block that has any."""
        return block_segments([d.row for d in self.demos], [d.length for d in self.demos], self.shard_rows)

    def unit_inputs(self, unit: Unit) -> str:
        """Digest of everything but frames and rows that decides what a unit holds."""
        if unit.kind == "features":
            return self.cameras[unit.key].unit_identity(unit.view)
        if unit.kind == "steps":
            return json_digest(["steps", self.action_dim])
        if unit.kind == "low_dim":
            return json_digest(["low_dim", unit.key, list(self.low_dim[unit.key])])
        if unit.kind == "rows":
            return json_digest([{key: list(shape) for key, shape in self.low_dim.items()}, self.action_dim])
        return json_digest(["frame digests"])

    def live_units(self) -> Iterator[Unit]:
        """Every unit that a complete cache must hold, block by block."""
        for block in self.block_segments():
            yield Unit("steps", "", 0, block)
            for key in self.low_dim:
                yield Unit("low_dim", key, 0, block)
            for camera, entry in self.cameras.items():
                yield Unit("frames", camera, 0, block)
                for view in range(entry.views):
                    yield Unit("features", camera, view, block)

    def to_json(self) -> dict[str, Any]:
        """A JSON value with its own digest under ``digest``."""
        value = {
            "format": self.format,
            "fingerprint": self.fingerprint,
            "shard_rows": self.shard_rows,
            "n_rows": self.n_rows,
            "batch_size": self.batch_size,
            "dtype": self.dtype,
            "cameras": {
                name: {
                    "feature_shape": list(entry.feature_shape),
                    "image_shape": list(entry.image_shape),
                    "views": entry.views,
                    "identity": entry.identity,
                    "view_spec": entry.view_spec,
                    "measured": entry.measured,
                }
                for name, entry in self.cameras.items()
            },
            "low_dim": {key: list(shape) for key, shape in self.low_dim.items()},
            "action_dim": self.action_dim,
            "files": [source.to_json() for source in self.files],
            "demos": [list(demo) for demo in self.demos],
            "masks": {key: list(demos) for key, demos in self.masks.items()},
            "absent": {key: list(names) for key, names in self.absent.items()},
            "filter_key": self.filter_key,
            "env_args": self.env_args,
            "render_flags": self.render_flags,
            "encoders": self.encoders,
            "units": self.units,
            "metadata": self.metadata,
        }
        return {**value, "digest": json_digest(value)}

    @classmethod
    def from_json(cls, value: Any) -> Manifest:
        """The manifest of :meth:`to_json`; ``ValueError`` when the digest is not that of the rest."""
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
        rest = {key: item for key, item in value.items() if key != "digest"}
        if not _digest_fits(rest, value):
            raise ValueError("its digest does not fit its contents")
        cameras = {
            name: CameraEntry(
                tuple(entry["feature_shape"]),
                tuple(entry["image_shape"]),
                entry["identity"],
                entry["views"],
                entry["view_spec"],
                entry["measured"],
            )
            for name, entry in rest["cameras"].items()
        }
        converted = {
            "cameras": cameras,
            "low_dim": {key: tuple(shape) for key, shape in rest["low_dim"].items()},
            "files": tuple(map(SourceRecord.from_json, rest["files"])),
            "demos": tuple(DemoRows(*demo) for demo in rest["demos"]),
            "masks": {key: tuple(demos) for key, demos in rest["masks"].items()},
            "absent": {key: tuple(names) for key, names in rest.get("absent", {}).items()},
            "filter_key": rest.get("filter_key", UNKNOWN),
        }
        return cls(**{**{key: item for key, item in rest.items() if key != "fingerprint"}, **converted})


def _digest_fits(rest: dict[str, Any], value: dict[str, Any]) -> bool:
    try:
        return value.get("digest") == json_digest(rest)
    except (ValueError, TypeError, RecursionError):
        return False


def _is_ours(file: Path) -> bool:
    """Whether a file is a manifest, of whatever format, that carries its own digest."""
    try:
        return _carries_digest(read_json(file))
    except (OSError, ValueError, RecursionError):
        return False


def _carries_digest(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("format"), int):
        return False
    return _digest_fits({key: item for key, item in value.items() if key != "digest"}, value)


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of a complete cache.

    Raises:
        NotACacheError: the path holds no cache at all, or one of another version's format.
        IncompleteCacheError: a cache was begun there and not finished.
        CorruptCacheError: the manifest is not what was written.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file():
        raise _no_manifest(path)
    return _read(path / MANIFEST)


def read_pending(path: str | Path) -> Manifest | None:
    """The manifest that an unfinished extraction is working towards; None when there is none or it is damaged."""
    try:
        return _read(Path(path) / PENDING)
    except CacheError:
        return None


def is_cache(path: str | Path) -> bool:
    """Whether the folder holds a cache, complete or not: a manifest or, should that be damaged, a ledger record.

    Contents decide, never names: each of these carries its own digest.
    """
    path = Path(path)
    return any(_is_ours(path / name) for name in (MANIFEST, PENDING)) or has_records(path)


def is_complete(path: str | Path) -> bool:
    """Whether the folder holds a complete cache."""
    try:
        read_manifest(path)
    except CacheError:
        return False
    return True


def _read(file: Path) -> Manifest:
    mend = "run the extract-features command again, with --overwrite, to make the cache anew"
    try:
        value = read_json(file)
        if isinstance(value, dict) and value.get("format") != FORMAT and _carries_digest(value):
            raise NotACacheError(
                f"{file} has format {value['format']}, this version reads format {FORMAT}; use the version that made it"
            )
        return Manifest.from_json(value)
    except OSError as error:
        if error.errno in NOT_ALLOWED:
            raise
        raise CorruptCacheError(f"{file} cannot be read ({error}); {mend}") from error
    except NotACacheError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if not is_cache(file.parent):
            raise NotACacheError(
                f"{file.parent} is no cache: its {file.name} is none that extract-features wrote; choose another path"
            ) from error
        raise CorruptCacheError(f"{file} is damaged: {error}; {mend}") from error


def _no_manifest(path: Path) -> Exception:
    if (path / PENDING).is_file() and is_cache(path):
        pending = read_pending(path)
        done = sum(1 for _ in (path / "ledger").rglob("*.json"))
        share = f"{done} of {len(list(pending.live_units()))} units are done" if pending else f"{done} units are done"
        return IncompleteCacheError(
            f"{path} is unfinished: {share}; run the same extract-features command again to go on"
        )
    if path.is_file():
        return NotACacheError(f"{path} is a file, not a cache; a cache is the folder that extract-features --out makes")
    if not path.exists():
        return NotACacheError(f"{path} does not exist; make a cache with: extract-features DATASET.hdf5 --out {path}")
    return NotACacheError(
        f"{path} holds no {MANIFEST}, so it is no cache; make one with: extract-features … --out PATH"
    )


def write_manifest(path: str | Path, manifest: Manifest) -> None:
    """Makes the cache complete, in one step: what is pending becomes the manifest."""
    write_pending(path, manifest)
    os.replace(Path(path) / PENDING, Path(path) / MANIFEST)
    sync_folder(Path(path))


def write_pending(path: str | Path, manifest: Manifest) -> None:
    """Records what is being worked towards."""
    write_json(Path(path) / PENDING, manifest.to_json())
