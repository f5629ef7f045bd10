"""Creates, resumes or extends a cache: read ▸ encode ▸ write. Units are written whole; the manifest is written last."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from cache_pipeline.cache.folder import make_beside, remove_other_weights, remove_partial_files, swap, told_when_full
from cache_pipeline.cache.lock import SharedLock, shared_writing, writing
from cache_pipeline.cache.manifest import Manifest
from cache_pipeline.cache.manifest_store import PENDING, claim_manifest, is_complete, read_manifest, write_pending
from cache_pipeline.cache.metadata import ROOT, complete_cache, metadata_files, root_file, write_metadata
from cache_pipeline.cache.store import real_store, stored_bytes
from cache_pipeline.cache.store_protocol import Stamp, Store
from cache_pipeline.errors import (
    NOT_ALLOWED,
    CacheError,
    CacheLockedError,
    ChangedError,
    IncompleteCacheError,
    counted,
)
from cache_pipeline.extract.camera_encoders import save_weights
from cache_pipeline.extract.config import ExtractConfig
from cache_pipeline.extract.engines import run_jobs
from cache_pipeline.extract.finish import finish, is_up_to_date, missing_units
from cache_pipeline.extract.prepare import Prepared, metadata_digests, planned_bytes, prepare
from cache_pipeline.extract.worker import Ran
from cache_pipeline.files import digest, json_digest
from cache_pipeline.memory import retained_memory
from cache_pipeline.text import listed

logger = logging.getLogger("cache_pipeline")


class ExtractResult(NamedTuple):
    """Figures of an extraction.

    Attributes:
        images: frames encoded, each view counted.
        seconds: total wall time; read_s, encode_s, write_s: time of each stage. Stages run in parallel.
        bytes: size of the cache.
        units_encoded, units_reused: units written by this run, and units that were already finished; of its own part.
        fingerprint: None while units of other parts are missing.
        units_missing: number of those.
        part: ``3/16``, or None.
    """

    cache: str
    images: int
    cameras: tuple[str, ...]
    seconds: float
    images_per_s: float
    read_s: float
    encode_s: float
    write_s: float
    bytes: int
    units_encoded: int
    units_reused: int
    fingerprint: str | None
    units_missing: int = 0
    part: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object of the fields."""
        return {**self._asdict(), "cameras": list(self.cameras)}

    def lines(self) -> list[str]:
        """For people."""
        stages = f"read {self.read_s:.1f} s, encode {self.encode_s:.1f} s, write {self.write_s:.1f} s"
        images = counted(self.images, "image")
        state = f"complete, {self.bytes / 1e6:.1f} MB, fingerprint {self.fingerprint}"
        if self.units_missing:
            missing = counted(self.units_missing, "unit")
            state = f"part {self.part} is done; {missing} of other parts to come, and the last part completes the cache"
        return [
            f"{self.cache}: {state}",
            f"{images} of {listed(self.cameras, limit=5)} in {self.seconds:.1f} s, {self.images_per_s:.1f}/s",
            f"stages (in parallel): {stages}",
            f"{counted(self.units_encoded, 'unit')} written, {self.units_reused} reused",
        ]


def extract_features(config: ExtractConfig, *, progress: bool = True) -> ExtractResult:
    """Encodes every frame that the cache does not hold yet.

    After a kill, the next call continues with the first unfinished unit. The result has the same digests as without the
    kill.

    Args:
        config: what to extract.
        progress: report on stderr.

    Raises:
        CacheLockedError: another process is writing the cache.
        StaleCacheError, NotACacheError, DatasetError, EncoderError, ConfigError: before any work.
        CacheError: the disk is full.
    """
    started = time.perf_counter()
    with retained_memory():
        done = _extract(config, progress)
    seconds, work = time.perf_counter() - started, done.prepared.work
    return ExtractResult(
        cache=str(config.out),
        images=work.images,
        cameras=tuple(done.prepared.manifest.cameras),
        seconds=seconds,
        images_per_s=work.images / seconds,
        read_s=done.ran.read_s,
        encode_s=done.ran.encode_s,
        write_s=done.ran.write_s,
        bytes=stored_bytes(done.prepared.out),
        units_encoded=work.units,
        units_reused=work.units_reused,
        fingerprint=done.finished.fingerprint if done.finished else None,
        units_missing=done.missing,
        part=str(config.part) if config.part else None,
    )


class _Done(NamedTuple):
    """``finished`` is the manifest of the complete cache; None while ``missing`` units of other parts are not done."""

    prepared: Prepared
    finished: Manifest | None
    ran: Ran = Ran(0.0, 0.0, 0.0, 0)
    missing: int = 0


def _extract(config: ExtractConfig, progress: bool) -> _Done:
    """Extracts under the writer's lock, or under one that is shared with other parts."""
    out = real_store(config.out)
    lock: SharedLock | None = None
    with ExitStack() as stack:
        try:
            if isinstance(out.place, Path):
                out.place.parent.mkdir(parents=True, exist_ok=True)
            if config.in_parts:
                lock = stack.enter_context(shared_writing(out))
            else:
                out = stack.enter_context(writing(out))
        except OSError as error:
            return _nothing_to_do(config, out, error)
        prepared = prepare(config, out, change=lock is None or lock.alone)
        _tell_changes(prepared)
        with told_when_full(out.place, planned_bytes(prepared), ", which continues where it stopped"):
            if is_up_to_date(prepared):
                prepared.store.delete(PENDING)  # left by an earlier extension
                done = _Done(prepared, prepared.old)
            else:
                done = _in_parts(config, prepared, lock, progress) if lock else _at_once(config, prepared, progress)
            if prepared.store is not prepared.out:
                swap(prepared.store, prepared.out, prepared.stamps[0])
    return done


def _at_once(config: ExtractConfig, prepared: Prepared, progress: bool) -> _Done:
    """Makes all missing units and completes the cache."""
    with ThreadPoolExecutor(1) as background:
        claim, begun = _begin(prepared, background)
        if not config.in_this_process:
            begun.result()  # other processes read the weights
        ran = run_jobs(config, prepared, claim, progress)
        prepared = _with_batch_size(prepared, ran)
        finished = finish(prepared, begun.result())
    _complete(prepared, finished, claim)
    return _Done(prepared, finished, ran)


def _in_parts(config: ExtractConfig, prepared: Prepared, lock: SharedLock, progress: bool) -> _Done:
    """Makes the units of one part, and completes the cache if those of all other parts are done too."""
    if lock.alone:
        with ThreadPoolExecutor(1) as background:
            claim, begun = _begin(prepared, background)
            metadata = begun.result()
        lock.let_others_in()
    else:
        claim, metadata = None, _join(prepared)
    ran = run_jobs(config, prepared, claim, progress)
    prepared = _with_batch_size(prepared, ran)
    missing = missing_units(prepared)
    if missing and config.part is None:
        total = sum(1 for _ in prepared.manifest.live_units())
        raise IncompleteCacheError(
            f"{config.out} is unfinished: {len(missing)} of {total} units are missing ({listed(missing, limit=3)}); "
            "run the parts that have not ended again, or this command without --finish, which makes all that is missing"
        )
    if missing:
        return _Done(prepared, None, ran, len(missing))
    finished = finish(prepared, metadata)
    try:
        _complete(prepared, finished, claim)
    except ChangedError:
        if not is_complete(prepared.store) or read_manifest(prepared.store).fingerprint != finished.fingerprint:
            raise  # else another part has completed the cache at the same moment
    return _Done(prepared, finished, ran)


def _with_batch_size(prepared: Prepared, ran: Ran) -> Prepared:
    return prepared._replace(manifest=replace(prepared.manifest, batch_size=ran.batch_size))


def _complete(prepared: Prepared, finished: Manifest, claim: Stamp | None) -> None:
    complete_cache(prepared.store, finished, claim)
    remove_other_weights(prepared.store, finished.encoders.values())


def _join(prepared: Prepared) -> dict[str, str]:
    """Returns the digests of metadata and weights that the first part has written.

    Raises:
        CacheLockedError: the other parts make another cache.
    """
    pending = prepared.pending or prepared.old
    if pending is None or _to_make(pending) != _to_make(prepared.manifest):
        raise CacheLockedError(
            f"{prepared.out.place} is being written in parts with other options or other data; wait for these parts or "
            "stop them, then run the command again"
        )
    return {name: value for name, value in pending.metadata.items() if name != ROOT}


def _to_make(manifest: Manifest) -> Manifest:
    """Returns what must be equal for all parts of a cache."""
    demos = tuple(demo._replace(digests={}) for demo in manifest.demos)
    return replace(manifest, demos=demos, units={}, metadata={}, devices=(), batch_size=1)


def _nothing_to_do(config: ExtractConfig, out: Store, error: OSError) -> _Done:
    """Returns the result of an up-to-date cache that is not writable; raises CacheError if it is not up to date."""
    if error.errno not in NOT_ALLOWED or not is_complete(out):
        raise error
    prepared = prepare(config, out, change=False)
    if prepared.old is None or not is_up_to_date(prepared):
        raise CacheError(
            f"{config.out} is not up to date and cannot be written ({error.strerror}: {error.filename}); "
            "get write permission, or give another --out"
        ) from error
    return _Done(prepared, prepared.old)


def _tell_changes(prepared: Prepared) -> None:
    if prepared.old is None:
        return
    for what in ("added", "changed", "removed"):
        names = getattr(prepared.matching, what)
        if names:
            logger.info("%s: %d demos %s: %s", prepared.out.place, len(names), what, listed(names, limit=5))


def _begin(prepared: Prepared, background: Executor) -> tuple[Stamp | None, Future[dict[str, str]]]:
    """Begins or goes on with the cache; the weights are written in the background.

    Returns:
        The stamp of the claimed manifest, and the future of the digests of metadata and weights.
    """
    store = prepared.store
    if store is not prepared.out:
        make_beside(store, prepared.out, "new")
    remove_partial_files(store)
    claim = claim_manifest(store, prepared.stamps[1], {"target": json_digest(_to_make(prepared.manifest).to_json())})
    files = metadata_files(prepared.manifest)
    metadata = {name: digest(content) for name, content in files.items()}
    write_pending(store, replace(prepared.manifest, metadata=metadata))
    # A cache that is extended keeps its root group: it describes what is complete until all else is.
    root = {} if prepared.old else {ROOT: root_file(prepared.manifest, complete=False)}
    write_metadata(store, {**root, **files})
    return claim, background.submit(_save_weights, prepared)


def _save_weights(prepared: Prepared) -> dict[str, str]:
    known = prepared.old or prepared.pending
    save_weights(prepared.store, prepared.encoders, known.metadata if known else {})
    metadata = metadata_digests(prepared)
    write_pending(prepared.store, replace(prepared.manifest, metadata=metadata))
    return metadata
