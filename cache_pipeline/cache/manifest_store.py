"""The manifest of a cache on its store: reading, writing and claiming it.

``pending.json`` has the same form and exists while units are being written. A folder with only a pending manifest is
an unfinished cache. A folder with both is a complete cache with an unfinished extension.

An object store has no locks. There a writer first claims the manifest: it writes it again, unchanged but for the digest
of what it will make, on the condition that nobody else has written it since. The finished manifest is written on the
condition that the claim still stands. Of two writers with different aims, the one who claims last can finish.
"""

from __future__ import annotations

import json
from typing import Any

from cache_pipeline.cache.ledger import has_records, record_names
from cache_pipeline.cache.manifest import FORMAT, TABLES, Manifest, digest_fits
from cache_pipeline.cache.store import Place, exists, is_remote, store_at
from cache_pipeline.cache.store_protocol import Stamp, Store
from cache_pipeline.cache.table import DemoTable
from cache_pipeline.errors import (
    NOT_ALLOWED,
    CacheError,
    ChangedError,
    CorruptCacheError,
    IncompleteCacheError,
    NotACacheError,
)
from cache_pipeline.files import Location, digest, json_bytes, json_digest

MANIFEST = "manifest.json"
PENDING = "pending.json"
CLAIM = "claim"


def _read_object(store: Store, name: str) -> Any:
    return json.loads(store.read(name))


def _is_ours(store: Store, name: str) -> bool:
    """Whether an object is a manifest, of any format version, with a valid digest."""
    try:
        return _carries_digest(_read_object(store, name))
    except (OSError, ValueError, RecursionError):
        return False


def _carries_digest(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("format"), int):
        return False
    return digest_fits({key: item for key, item in value.items() if key != "digest"}, value)


def read_manifest(place: Place) -> Manifest:
    """Reads the manifest of a complete cache.

    Raises:
        NotACacheError: the place holds no cache, or a cache in the format of another version.
        IncompleteCacheError: the cache is unfinished.
        CorruptCacheError: the manifest is damaged.
    """
    store = store_at(place)
    if not exists(store, MANIFEST):
        raise _no_manifest(store)
    return _read(store, MANIFEST)


def read_pending(place: Place) -> Manifest | None:
    """Reads the target manifest of an unfinished extraction; None if it is missing, damaged, or has become the
    manifest: then a kill left it behind."""
    store = store_at(place)
    try:
        pending = _read(store, PENDING)
        left_behind = exists(store, MANIFEST) and store.read(MANIFEST) == store.read(PENDING)
    except (CacheError, FileNotFoundError):
        return None
    return None if left_behind else pending


def is_cache(place: Place) -> bool:
    """Whether the place holds a cache, complete or not: a valid manifest, or else a valid ledger record.

    Each of these carries its own digest; names are not trusted.
    """
    store = store_at(place)
    return any(_is_ours(store, name) for name in (MANIFEST, PENDING)) or has_records(store)


def is_complete(place: Place) -> bool:
    """Whether the place holds a complete cache."""
    try:
        read_manifest(place)
    except CacheError:
        return False
    return True


def _read(store: Store, name: str) -> Manifest:
    mend = "run the extract-features command again with --overwrite to replace the cache"
    file = f"{store.place}/{name}"
    try:
        value = _read_object(store, name)
        if isinstance(value, dict) and value.get("format") != FORMAT and _carries_digest(value):
            raise NotACacheError(
                f"{file} has format {value['format']}; this version reads format {FORMAT}; use the version that made it"
            )
        if _is_bare_claim(value):
            raise _no_manifest(store)
        return Manifest.from_json(value, _read_table(store, value))
    except OSError as error:
        if error.errno in NOT_ALLOWED:
            raise
        raise CorruptCacheError(f"{file} cannot be read ({error}); {mend}") from error
    except CacheError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if not is_cache(store):
            raise NotACacheError(
                f"{store.place} is not a cache: extract-features did not write its {name}; choose another path"
            ) from error
        raise CorruptCacheError(f"{file} is damaged: {error}; {mend}") from error


def _read_table(store: Store, value: Any) -> DemoTable | None:
    """Reads the demo table that a manifest names; None if the manifest holds it itself."""
    name = value.get("demos") if isinstance(value, dict) else None
    if not isinstance(name, str):
        return None
    data = store.read(name)
    if name != f"{TABLES}/{digest(data)}.npz":
        raise ValueError(f"the digest of {name} does not match its contents")
    return DemoTable.from_bytes(data)


def _no_manifest(store: Store) -> CacheError:
    place: Location = store.place
    if exists(store, PENDING) and is_cache(store):
        pending = read_pending(store)
        done = sum(1 for _ in record_names(store))
        share = f"{done} of {len(list(pending.live_units()))} units are done" if pending else f"{done} units are done"
        return IncompleteCacheError(
            f"{place} is unfinished: {share}; run the same extract-features command again to continue"
        )
    if replaced_by(store) is not None:
        return IncompleteCacheError(f"{place} is being replaced; run the command that replaces it again to finish")
    if isinstance(place, str):
        return NotACacheError(f"{place} holds no cache; make one with: extract-features DATASET.hdf5 --out {place}")
    if place.is_file():
        return NotACacheError(f"{place} is a file, not a cache; a cache is a folder that extract-features --out makes")
    if not place.exists():
        return NotACacheError(f"{place} does not exist; make a cache with: extract-features DATASET.hdf5 --out {place}")
    return NotACacheError(f"{place} is not a cache: it has no {MANIFEST}; make one with: extract-features … --out PATH")


def write_manifest(place: Place, manifest: Manifest, after: Stamp | None = None) -> None:
    """Completes the cache in one atomic step.

    Args:
        after: on an object store, the stamp that the manifest must still have; None: it must be missing.

    Raises:
        ChangedError: another process has written it.
    """
    store = store_at(place)
    _write_table(store, manifest)
    try:
        store.write_after(MANIFEST, after, json_bytes(manifest.to_json()))
    except ChangedError:
        check_claim(store, after)
        raise
    store.delete(PENDING)
    for name, _ in list(store.sizes(f"{TABLES}/")):
        if manifest.table is None or name != manifest.table[0]:
            store.delete(name)


def write_pending(place: Place, manifest: Manifest) -> None:
    """Writes the target manifest of an extraction."""
    _write_table(store_at(place), manifest)
    store_at(place).write(PENDING, json_bytes(manifest.to_json()))


def _write_table(store: Store, manifest: Manifest) -> None:
    if manifest.table is None:
        return
    name, data = manifest.table
    if not exists(store, name) or store.read(name) != data:
        store.write(name, data)


def claim_manifest(store: Store, after: Stamp | None, purpose: dict[str, Any]) -> Stamp | None:
    """Claims the manifest for a purpose, which is written into it; returns its new stamp. A folder has a lock instead.

    Raises:
        ChangedError: another process has written the manifest since it had the stamp ``after``.
    """
    if not is_remote(store):
        return after
    value: dict[str, Any] = {"format": FORMAT}
    if after is not None:
        value = {key: item for key, item in _read_object(store, MANIFEST).items() if key != "digest"}
        if value.get(CLAIM) == purpose:
            return after
    if "replaced_by" in purpose:
        value = {"format": FORMAT}
    value[CLAIM] = purpose
    return store.write_after(MANIFEST, after, json_bytes({**value, "digest": json_digest(value)}))


def check_claim(store: Store, claim: Stamp | None) -> None:
    """Raises ChangedError if the manifest has not the stamp of the claim any more, on an object store."""
    if is_remote(store) and store.stamp(MANIFEST) != claim:
        raise ChangedError(
            f"another process writes {store.place} too, and has begun later; what it has written stays. Wait for it, "
            "then run the same command again"
        )


def replaced_by(store: Store) -> str | None:
    """Returns the name of the cache beside this one that replaces it, if that has begun; only on an object store."""
    try:
        value = _read_object(store, MANIFEST)
    except (OSError, ValueError, RecursionError):
        return None
    name = value[CLAIM].get("replaced_by") if _is_bare_claim(value) else None
    return name if isinstance(name, str) else None


def _is_bare_claim(value: Any) -> bool:
    """Whether a manifest holds a claim and nothing else, since the cache has never been complete or is replaced."""
    return _carries_digest(value) and isinstance(value.get(CLAIM), dict) and "demos" not in value
