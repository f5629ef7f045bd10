"""Reads every stored byte of a cache and lists the damaged units."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, NamedTuple

from cache_pipeline.cache.arrays import StoredArray, unit_arrays
from cache_pipeline.cache.layout import Unit
from cache_pipeline.cache.ledger import read_record, strike_record
from cache_pipeline.cache.lock import writer_lock
from cache_pipeline.cache.manifest import Manifest
from cache_pipeline.cache.manifest_store import MANIFEST, PENDING, read_manifest, read_pending
from cache_pipeline.cache.store import Place, exists, store_at
from cache_pipeline.cache.store_protocol import Store
from cache_pipeline.errors import CacheLockedError, CorruptCacheError, StoreError
from cache_pipeline.files import digest

logger = logging.getLogger("cache_pipeline")

THREADS = 4


class IntegrityResult(NamedTuple):
    """Result of checking every stored byte.

    Attributes:
        units: units checked.
        broken: names of damaged units, and paths inside the cache of damaged files that belong to no unit.
        ok: whether nothing is damaged.
    """

    cache: str
    units: int
    broken: tuple[str, ...]
    ok: bool

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as a JSON object."""
        return {**self._asdict(), "broken": list(self.broken)}

    def lines(self) -> list[str]:
        """For people."""
        if self.ok:
            return [f"{self.cache}: all {self.units} units are intact"]
        return [f"{self.cache}: {len(self.broken)} damaged", *(f"  {name}" for name in self.broken)]


def check_integrity(cache_path: Place) -> IntegrityResult:
    """Compares every file of a complete cache with its recorded digest.

    Records of damaged units are removed from the ledger if the folder is writable. The next extraction then
    writes only these units again.

    Raises:
        NotACacheError, IncompleteCacheError: there is no complete cache.
    """
    store = store_at(cache_path)
    try:
        manifest = read_manifest(store)
    except CorruptCacheError:
        return IntegrityResult(str(store.place), 0, (MANIFEST,), False)
    broken = [*_broken_files(store, manifest)]
    with ThreadPoolExecutor(THREADS) as pool:
        names = [name for name in manifest.units if not _is_hidden(manifest, Unit.parse(name), broken)]
        sound = pool.map(lambda name: is_sound(store, manifest, Unit.parse(name)), names)
        broken_units = [name for name, fits in zip(names, sound, strict=True) if not fits]
    if broken_units:
        _strike(store, broken_units)
    broken += broken_units
    return IntegrityResult(str(store.place), len(manifest.units), tuple(broken), not broken)


def _is_hidden(manifest: Manifest, unit: Unit, broken: list[str]) -> bool:
    """Whether damaged metadata prevents reading a unit. It is checked after the metadata is repaired."""
    return any(f"{name}/zarr.json" in broken for name in unit_arrays(manifest, unit))


def is_sound(store: Store, manifest: Manifest, unit: Unit) -> bool:
    """Whether a unit has a record and its stored bytes have the recorded digest."""
    record = read_record(store, unit)
    if record is None or record.output != manifest.units[unit.name]:
        return False
    try:
        blocks = [StoredArray(store, name).block(unit.block, unit.view) for name in unit_arrays(manifest, unit)]
    except CorruptCacheError:
        return False
    return digest(*(block.tobytes() for block in blocks)) == record.output


def _broken_files(store: Store, manifest: Manifest) -> Iterator[str]:
    pending = read_pending(store)
    if pending is None and exists(store, PENDING) and store.read(PENDING) != store.read(MANIFEST):
        yield PENDING
    expected = pending.metadata if pending else {}
    for name, recorded in manifest.metadata.items():
        if not exists(store, name) or digest(store.read(name)) not in (recorded, expected.get(name)):
            yield name


def _strike(store: Store, units: list[str]) -> None:
    try:
        with nullcontext() if isinstance(store.place, str) else writer_lock(store.place):
            for name in units:
                strike_record(store, Unit.parse(name))
    except (OSError, StoreError, CacheLockedError) as error:
        logger.warning("cannot remove damaged units from the ledger of %s: %s", store.place, error)
