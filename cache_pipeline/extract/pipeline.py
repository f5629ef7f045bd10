"""Creates, resumes or extends a cache: read ▸ encode ▸ write. Units are written whole; the manifest is written last."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from cache_pipeline.cache.folder import (
    make_beside,
    remove_other_weights,
    remove_partial_files,
    swap,
    told_when_full,
)
from cache_pipeline.cache.lock import writing
from cache_pipeline.cache.manifest import PENDING, Manifest, claim_manifest, is_complete, write_pending
from cache_pipeline.cache.metadata import ROOT, complete_cache, metadata_files, root_file, write_metadata
from cache_pipeline.cache.store import real_store, stored_bytes
from cache_pipeline.cache.store_protocol import Stamp, Store
from cache_pipeline.errors import NOT_ALLOWED, CacheError, counted
from cache_pipeline.extract.camera_encoders import save_weights
from cache_pipeline.extract.config import ExtractConfig
from cache_pipeline.extract.finish import finish, is_up_to_date
from cache_pipeline.extract.prepare import Prepared, metadata_digests, planned_bytes, prepare
from cache_pipeline.extract.worker import Worker
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
        units_encoded, units_reused: units written by this run, and units that were already finished.
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
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        """A JSON object of the fields."""
        return {**self._asdict(), "cameras": list(self.cameras)}

    def lines(self) -> list[str]:
        """For people."""
        stages = f"read {self.read_s:.1f} s, encode {self.encode_s:.1f} s, write {self.write_s:.1f} s"
        images = counted(self.images, "image")
        return [
            f"{self.cache}: complete, {self.bytes / 1e6:.1f} MB, fingerprint {self.fingerprint}",
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
        prepared, finished, worker = _extract(config, progress)
    seconds = time.perf_counter() - started
    return ExtractResult(
        cache=str(config.out),
        images=prepared.work.images,
        cameras=tuple(finished.cameras),
        seconds=seconds,
        images_per_s=prepared.work.images / seconds,
        read_s=worker.read_s,
        encode_s=worker.encode_s,
        write_s=worker.write_s,
        bytes=stored_bytes(prepared.out),
        units_encoded=prepared.work.units,
        units_reused=prepared.work.units_reused,
        fingerprint=finished.fingerprint,
    )


def _extract(config: ExtractConfig, progress: bool) -> tuple[Prepared, Manifest, Worker]:
    """Extracts under the writer's lock and returns the manifest of the complete cache."""
    out = real_store(config.out)
    with ExitStack() as stack:
        try:
            if isinstance(out.place, Path):
                out.place.parent.mkdir(parents=True, exist_ok=True)
            out = stack.enter_context(writing(out))
        except OSError as error:
            return _nothing_to_do(config, out, error)
        prepared = prepare(config, out)
        _tell_changes(prepared)
        with told_when_full(out.place, planned_bytes(prepared), ", which continues where it stopped"):
            worker = Worker(prepared, progress)
            if is_up_to_date(prepared):
                assert prepared.old is not None
                finished = prepared.old
                prepared.store.delete(PENDING)  # left by an earlier extension
            else:
                with ThreadPoolExecutor(1) as background:
                    claim, begun = _begin(prepared, background)
                    worker.run(claim)
                    prepared = worker.prepared
                    finished = finish(prepared, begun.result())
                complete_cache(prepared.store, finished, claim)
                remove_other_weights(prepared.store, finished.encoders.values())
            if prepared.store is not prepared.out:
                swap(prepared.store, prepared.out, prepared.stamps[0])
    return prepared, finished, worker


def _nothing_to_do(config: ExtractConfig, out: Store, error: OSError) -> tuple[Prepared, Manifest, Worker]:
    """Returns the result of an up-to-date cache that is not writable; raises CacheError if it is not up to date."""
    if error.errno not in NOT_ALLOWED or not is_complete(out):
        raise error
    prepared = prepare(config, out, change=False)
    if prepared.old is None or not is_up_to_date(prepared):
        raise CacheError(
            f"{config.out} is not up to date and cannot be written ({error.strerror}: {error.filename}); "
            "get write permission, or give another --out"
        ) from error
    return prepared, prepared.old, Worker(prepared, progress=False)


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
    claim = claim_manifest(store, prepared.stamps[1], {"target": json_digest(prepared.manifest.to_json())})
    files = metadata_files(prepared.manifest)
    metadata = {name: digest(content) for name, content in files.items()}
    write_pending(store, replace(prepared.manifest, metadata=metadata))
    # A cache that is extended keeps its root group: it describes what is complete until all else is.
    root = {} if prepared.old else {ROOT: root_file(prepared.manifest, complete=False)}
    write_metadata(store, {**root, **files})
    return claim, background.submit(_save_weights, prepared)


def _save_weights(prepared: Prepared) -> dict[str, str]:
    save_weights(prepared.store, prepared.encoders, prepared.old.metadata if prepared.old else {})
    metadata = metadata_digests(prepared)
    write_pending(prepared.store, replace(prepared.manifest, metadata=metadata))
    return metadata
