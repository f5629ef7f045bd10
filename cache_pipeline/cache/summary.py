"""Summarises a cache: contents, origin and state. A damaged cache is reported, not raised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from cache_pipeline.cache.layout import Unit
from cache_pipeline.cache.ledger import read_record, record_name, record_names
from cache_pipeline.cache.manifest import ACTIONS, Manifest
from cache_pipeline.cache.manifest_store import is_cache, read_manifest, read_pending
from cache_pipeline.cache.stillness import still_cameras
from cache_pipeline.cache.store import Place, store_at, stored_bytes
from cache_pipeline.cache.store_protocol import Store
from cache_pipeline.cache.table import tasks
from cache_pipeline.errors import CorruptCacheError, IncompleteCacheError, NotACacheError
from cache_pipeline.text import by_name, few, listed, shortened

ALL = "--json lists all"
READ_RECORDS = 10_000
"""Up to this number of units, their records are read; verify --integrity reads all of any number."""
State = Literal["complete", "incomplete", "corrupt"]


class CacheSummary(NamedTuple):
    """Summary of a cache.

    Attributes:
        state: ``complete``, ``incomplete`` (the first extraction is unfinished) or ``corrupt``.
        problem: what is wrong and how to repair it; empty if nothing is.
        units_done, units: numbers of finished and of all units; those of the extension if one is unfinished.
        bytes: total size of all files.
        dead_rows: rows that ``cache compact`` frees.
        manifest: the manifest, or the target manifest of an unfinished cache; None if neither can be read.
        notes: unusual but allowed findings, such as a camera that is black through a demo.
    """

    path: str
    state: State
    problem: str
    units_done: int
    units: int
    bytes: int
    dead_rows: int
    manifest: Manifest | None
    notes: tuple[str, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """Problems of the cache. An unfinished extension is none, since the earlier contents are complete."""
        return () if self.state == "complete" else (self.problem,)

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object: state, sizes, cameras with their identity, demos."""
        value: dict[str, Any] = {**self._asdict(), "notes": list(self.notes), "kind": "cache"}
        manifest = value.pop("manifest")
        if manifest is None:
            return value
        cameras = {name: entry.to_json() for name, entry in manifest.cameras.items()}
        return {
            **value,
            "fingerprint": manifest.fingerprint,
            "dtype": manifest.dtype,
            "demos": len(manifest.demos),
            "rows": manifest.rows,
            "shard_rows": manifest.shard_rows,
            "batch_size": manifest.batch_size,
            "action_dim": manifest.action_dim,
            "low_dim": {key: list(shape) for key, shape in manifest.low_dim.items()},
            "masks": {key: len(demos) for key, demos in manifest.masks.items()},
            "files": [source.path for source in manifest.files],
            "layouts": [source.layout for source in manifest.files],
            "action_keys": list(manifest.action_keys),
            "tasks": dict(Counter(task for task in tasks(manifest.demos) if task is not None)),
            "cameras": cameras,
        }

    def lines(self) -> list[str]:
        """Returns the summary as lines for a terminal."""
        lines = [f"cache {self.path}: {self.state}, {self.bytes / 1e6:.1f} MB"]
        if self.problem:
            lines.append(f"  {self.problem}")
        if self.units_done < self.units:
            lines.append(f"  {self.units_done} of {self.units} units are done")
        if self.manifest is not None:
            lines += [f"  {line}" for line in _manifest_lines(self.manifest, self.dead_rows)]
        return [*lines, *(f"  note: {note}" for note in few(self.notes, "note", more=ALL))]


def inspect_cache(place: Place) -> CacheSummary:
    """Summarises a cache; reports its problems instead of raising them.

    Raises:
        NotACacheError: the place holds no cache.
    """
    store = store_at(place)
    state: State = "complete"
    problem, manifest = "", None
    try:
        manifest = read_manifest(store)
    except IncompleteCacheError as error:
        state, problem = "incomplete", str(error)
    except CorruptCacheError as error:
        state, problem = "corrupt", str(error)
    except NotACacheError as error:
        if not is_cache(store):
            raise
        state, problem = "corrupt", str(error)
    target = read_pending(store) or manifest
    units = _units(target, manifest) if target else []
    done = _count_done(store, units)
    if state == "complete" and target is not manifest:
        problem = "an extension is unfinished; run the same extract-features command again to continue"
    elif state == "complete" and done < len(units):
        state = "corrupt"
        problem = "units are missing from the ledger; run the extract-features command again to write them again"
    shown = manifest or target
    dead = _dead_rows(manifest) if manifest else 0
    notes = still_cameras(store, manifest) if manifest and state == "complete" else ()
    return CacheSummary(str(store.place), state, problem, done, len(units), stored_bytes(store), dead, shown, notes)


def _units(target: Manifest, manifest: Manifest | None) -> list[Unit]:
    """Returns the units that the ledger must hold: those of the manifest, or those of an unfinished extraction."""
    if target is manifest:
        return [Unit.parse(name) for name in manifest.units]
    return list(target.live_units())


def _count_done(store: Store, units: Sequence[Unit]) -> int:
    """Returns how many units have a record. Of many units the records are counted, not read."""
    if len(units) <= READ_RECORDS:
        return sum(read_record(store, unit) is not None for unit in units)
    stored = set(record_names(store))
    return sum(record_name(unit) in stored for unit in units)


def _dead_rows(manifest: Manifest) -> int:
    """Returns the number of rows that belong to no live demo."""
    return manifest.n_rows - manifest.rows


def _manifest_lines(manifest: Manifest, dead_rows: int) -> list[str]:
    rows = manifest.rows
    blocks = len(manifest.live_blocks())
    lines = [
        f"fingerprint {manifest.fingerprint}",
        f"{len(manifest.demos)} demos, {rows} rows in {blocks} blocks of {manifest.shard_rows}, {manifest.dtype}",
    ]
    if dead_rows:
        lines.append(f"{dead_rows} rows are dead; cache compact frees them")
    said = {}
    for name, entry in manifest.cameras.items():
        identity = entry.identity
        weights, precision = identity.get("weights", {}), identity.get("precision", {})
        said[name] = (
            f"{_shape(entry.image_shape)} → {_shape(entry.feature_shape)}, {entry.views} "
            f"view{'s' if entry.views > 1 else ''}, {identity.get('architecture')} at {identity.get('cut')}, weights "
            f"{weights.get('source')} ({str(weights.get('digest'))[:12]}), computed in {precision.get('compute')}"
            f"{_measured(entry.measured or {})}"
        )
    lines += [line if line.startswith("…") else f"camera {line}" for line in by_name(said, "camera", more=ALL)]
    keys = listed(f"{shortened(key)} {_shape(shape)}" for key, shape in manifest.low_dim.items())
    lines.append(f"low-dim obs: {keys or 'none'}; actions {manifest.action_dim}{_from(manifest.action_keys)}")
    counts = Counter(shortened(task) for task in tasks(manifest.demos) if task is not None)
    lines += [f"tasks: {listed(f'{task} ({count})' for task, count in counts.items())}"] if counts else []
    masks = listed(f"{shortened(key)} ({len(demos)})" for key, demos in manifest.masks.items())
    lines.append(f"filter keys: {masks or 'none'}")
    return [*lines, *few([f"from {source.path}" for source in manifest.files], "file", more=ALL)]


def _from(action_keys: tuple[str, ...]) -> str:
    return f" from {listed(action_keys)}" if action_keys != ACTIONS else ""


def _measured(measured: dict[str, Any]) -> str:
    error = measured.get("error_over_variation")
    return "" if error is None else f", error {error:.1e} of the features' variation over frames"


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "1"
