"""Prepares an extraction: checks all inputs before any work, and finds the units to write."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from cache_pipeline.cache.arrays import array_specs, unit_arrays
from cache_pipeline.cache.folder import check_target, finish_swap, remove_cache, stores_beside, unused_sibling
from cache_pipeline.cache.layout import choose_shard_rows, place_demos
from cache_pipeline.cache.manifest import ACTIONS, Manifest
from cache_pipeline.cache.manifest_store import MANIFEST, is_cache, read_manifest, read_pending
from cache_pipeline.cache.metadata import metadata_files
from cache_pipeline.cache.store import exists
from cache_pipeline.cache.store_protocol import Stamp, Store
from cache_pipeline.cache.table import DemoRows
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.demos.remote import recorded_path
from cache_pipeline.encoders.device import device_name, resolve_device
from cache_pipeline.encoders.frozen import preferred_batch_size
from cache_pipeline.errors import (
    CorruptCacheError,
    DatasetError,
    IncompleteCacheError,
    OptionError,
    StaleCacheError,
    available,
)
from cache_pipeline.extract.camera_encoders import (
    CameraEncoder,
    build_encoders,
    check_names,
    check_precisions,
    for_cameras,
)
from cache_pipeline.extract.config import ExtractConfig
from cache_pipeline.extract.matching import Matching, match_demos, recorded_dataset, source_records
from cache_pipeline.extract.staleness import MEND, check_actions, check_camera, check_rows, check_store
from cache_pipeline.extract.units import Work, find_work
from cache_pipeline.files import digest

logger = logging.getLogger("cache_pipeline")

MAX_UNIT_FRAME_BYTES = 128 << 20
MAX_NAME_BYTES = 255


class Prepared(NamedTuple):
    """An extraction whose inputs have passed all checks.

    Attributes:
        out: the cache; store: where to write, which is beside ``out`` with ``--overwrite``.
        stamps: stamps of the manifests in ``out`` and in ``store`` when they were read.
        manifest: the future manifest, without digests of new demos.
        old: the current manifest, if any.
        pending: in parts, the target manifest that an earlier part has written, if any.
        matching: new, changed and removed demos.
        work: units to write.
    """

    out: Store
    store: Store
    stamps: tuple[Stamp | None, Stamp | None]
    dataset: Dataset
    encoders: Mapping[str, CameraEncoder]
    manifest: Manifest
    old: Manifest | None
    pending: Manifest | None
    matching: Matching
    work: Work


def prepare(config: ExtractConfig, out: Store, *, change: bool = True) -> Prepared:
    """Opens the dataset, builds the encoders, compares the cache with both, and assigns rows to new demos.

    Args:
        config: the options.
        out: the cache.
        change: whether to remove leftovers of earlier runs; False: write nothing.

    Raises:
        DatasetError, EncoderError, ConfigError, NotACacheError, StaleCacheError: before any work.
    """
    if change:
        finish_swap(out)
    check_target(out)
    anew = config.overwrite and exists(out, MANIFEST)
    store = next(iter(stores_beside(out, "new")), unused_sibling(out, "new")) if anew else out
    stamps = out.stamp(MANIFEST), store.stamp(MANIFEST)
    old = None if anew else _manifest_so_far(store)
    pending = read_pending(store) if old is None or config.in_parts else None
    # All parts must decide alike, so a part takes what the first one has decided; else a complete cache comes first.
    earlier = (pending or old) if config.in_parts else (old or pending)
    with ThreadPoolExecutor(1, thread_name_prefix="build") as background:
        cached = {file: earlier.metadata.get(file) for file in earlier.encoders.values()} if earlier else {}
        build = functools.partial(build_encoders, store=store, cached=cached, stand_in=not change and earlier is None)
        building = background.submit(build, config.encoders_of_cameras())
        dataset = _open_dataset(config, old, earlier)
    for line in dataset.choice.lines():
        logger.info("%s", line)
    check_names(config, dataset)
    check_array_names(dataset)
    built = building.result()
    built |= build({config.encoder_for(camera) for camera in dataset.cameras} - built.keys())
    encoders = for_cameras(built, config, dataset, earlier)
    if old is not None and config.views < (views := max(entry.views for entry in old.cameras.values())):
        logger.info("%s: keeps its %d views of every frame", out.place, views)
    earlier = _check_stale(config, store, old, earlier, encoders, dataset.action_keys, change=change)
    if old is not None:
        check_rows(old, dataset.low_dim, dataset.action_dim)
    matching = match_demos(old, dataset, deep=config.deep)
    manifest = _target(config, dataset, encoders, old, earlier, matching)
    kept = [index is not None for index in matching.kept]
    work = Work(()) if config.finish else find_work(store, manifest, dataset, kept, config.part)
    check_precisions(encoders, [job.camera for job in work.jobs if job.views])
    devices = check_devices(config, work, earlier.devices if earlier and (old or config.in_parts) else ())
    manifest, pending = replace(manifest, devices=devices), pending if config.in_parts else None
    return Prepared(out, store, stamps, dataset, encoders, manifest, old, pending, matching, work)


def _manifest_so_far(store: Store) -> Manifest | None:
    if not exists(store, MANIFEST):
        return None
    try:
        return read_manifest(store)
    except IncompleteCacheError:  # on an object store: claimed, but never completed
        return None
    except CorruptCacheError as error:
        logger.warning("%s; the manifest is rebuilt from the ledger", str(error).split(";")[0])
        return None


def _open_dataset(config: ExtractConfig, old: Manifest | None, earlier: Manifest | None) -> Dataset:
    cameras = config.cameras
    if cameras is not None and old is not None:
        cameras = tuple(dict.fromkeys([*old.cameras, *cameras]))
    if earlier is not None and not config.deep and _same_request(config, cameras, earlier):
        dataset = recorded_dataset(earlier)
        if dataset is not None:
            return dataset
    dataset = Dataset.open(
        config.datasets,
        cameras=cameras,
        low_dim_keys=config.low_dim_keys,
        filter_key=config.filter_key,
        action_key=config.action_key,
    )
    missing = [camera for camera in old.cameras if camera not in dataset.cameras] if old else []
    if missing:
        meaning = f"the dataset has no camera {missing[0]}"
        raise StaleCacheError("cameras", list(old.cameras) if old else [], list(dataset.cameras), meaning, MEND)
    return dataset


def _same_request(config: ExtractConfig, cameras: tuple[str, ...] | None, old: Manifest) -> bool:
    """Whether the last extraction into the cache asked for the same files, demos and keys."""
    asked, wanted = old.asked or {}, _asked(cameras, config.low_dim_keys)
    files = [recorded_path(path) for path in config.datasets]
    same = all(asked.get(name) == value for name, value in wanted.items())
    same &= (config.action_key or ACTIONS) == old.action_keys
    return same and old.filter_key == config.filter_key and files == [source.path for source in old.files]


def _asked(cameras: tuple[str, ...] | None, low_dim_keys: tuple[str, ...] | None) -> dict[str, Any]:
    pairs = {"cameras": cameras, "low_dim_keys": low_dim_keys}
    return {name: None if names is None else list(names) for name, names in pairs.items()}


def _check_stale(
    config: ExtractConfig,
    store: Store,
    old: Manifest | None,
    earlier: Manifest | None,
    encoders: Mapping[str, CameraEncoder],
    actions: tuple[str, ...],
    *,
    change: bool,
) -> Manifest | None:
    """Raises StaleCacheError for other settings than in the cache; ``overwrite`` removes such an unfinished cache.

    Returns ``earlier``, or None if it was removed.
    """
    cached = earlier
    if cached is None:
        if change and config.overwrite and is_cache(store):
            remove_cache(store)
        return None
    try:
        check_store(cached, config.store_dtype, config.shard_rows)
        check_actions(cached, actions)
        for camera, entry in cached.cameras.items():
            if camera in encoders:
                check_camera(camera, entry, encoders[camera].entry)
    except StaleCacheError:
        if not config.overwrite or old is not None:
            raise
        if change:
            remove_cache(store)
        return None
    return earlier


def _target(
    config: ExtractConfig,
    dataset: Dataset,
    encoders: Mapping[str, CameraEncoder],
    old: Manifest | None,
    earlier: Manifest | None,
    matching: Matching,
) -> Manifest:
    shard_rows = earlier.shard_rows if earlier else (config.shard_rows or _shard_rows(config, encoders))
    kept = [old.demos[index] if old and index is not None else None for index in matching.kept]
    lengths = [demo.length for demo in dataset.demos]
    rows, n_rows = place_demos(lengths, [d.row if d else None for d in kept], old.n_rows if old else 0, shard_rows)
    demos = tuple(
        DemoRows(
            demo.file,
            demo.name,
            demo.length,
            row,
            was.digests if was else {},
            was.view_key if was else demo.name,
            demo.task,
        )
        for demo, row, was in zip(dataset.demos, rows, kept, strict=True)
    )
    return Manifest(
        shard_rows=shard_rows,
        n_rows=n_rows,
        batch_size=_batch_size(config, encoders, earlier, min(shard_rows, sum(lengths))),
        dtype=config.store_dtype,
        cameras={camera: encoder.entry for camera, encoder in encoders.items()},
        low_dim={key: tuple(shape) for key, shape in dataset.low_dim.items()},
        action_dim=dataset.action_dim,
        files=source_records(dataset),
        demos=demos,
        masks={key: tuple(map(int, members)) for key, members in dataset.masks.items()},
        absent=dict(dataset.absent),
        filter_key=config.filter_key,
        env_args=dataset.env_args,
        render_flags=dataset.render_flags,
        encoders={camera: encoder.file for camera, encoder in encoders.items()},
        asked={
            **_asked(config.cameras, config.low_dim_keys),
            "choice": {name: list(names) for name, names in dataset.choice._asdict().items() if name != "actions"},
        },
        action_keys=dataset.action_keys,
    )


def _batch_size(
    config: ExtractConfig, encoders: Mapping[str, CameraEncoder], earlier: Manifest | None, unit_frames: int
) -> int:
    """Returns the batch size: the option's, the cache's, or one for the device, but never more than a unit can fill."""
    sides = [e.frozen.preprocess.output_shape(*e.entry.image_shape[:2]) for e in encoders.values()]
    preferred = preferred_batch_size(resolve_device(config.device), max(height * width for height, width in sides))
    asked = config.batch_size or (earlier.batch_size if earlier else preferred)
    most = max(unit_frames, preferred)
    if config.batch_size and asked > most:
        logger.warning("batch_size %d is more than the %d frames of a unit; %d is used", asked, unit_frames, most)
    return min(asked, most)


def _shard_rows(config: ExtractConfig, encoders: Mapping[str, CameraEncoder]) -> int:
    itemsize = np.dtype(config.store_dtype).itemsize
    entries = [encoder.entry for encoder in encoders.values()]
    rows = choose_shard_rows(max(int(np.prod(entry.feature_shape)) * itemsize for entry in entries))
    widest = max(int(np.prod(entry.image_shape)) for entry in entries)
    while rows > 1 and rows * widest > MAX_UNIT_FRAME_BYTES:
        rows //= 2
    return rows


def planned_bytes(prepared: Prepared) -> int:
    """Returns an upper bound of the bytes to write: units and encoder weights."""
    manifest, specs = prepared.manifest, array_specs(prepared.manifest)
    units = [unit for job in prepared.work.jobs for unit in job.units]
    row_bytes = sum(specs[name].row_bytes for unit in units for name in unit_arrays(manifest, unit))
    total = manifest.shard_rows * row_bytes
    for file, encoder in {encoder.file: encoder for encoder in prepared.encoders.values()}.items():
        if not exists(prepared.store, file):
            total += sum(value.numel() * value.element_size() for value in encoder.encoder.state_dict().values())
    return total


def check_devices(config: ExtractConfig, work: Work, recorded: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of the devices that will have made the cache.

    Args:
        recorded: those that made it so far, if it says so.

    Raises:
        StaleCacheError, OptionError: features of unlike devices would be mixed, which the options do not allow.
    """
    known = {*recorded, *work.devices}
    if not any(job.views for job in work.jobs):
        return tuple(sorted(known))
    here = {device_name(resolve_device(name)) for name in config.devices or (config.device,)}
    was, now = (", ".join(sorted(names)) for names in (known, here))
    if len(here) > 1 and not config.allow_other_device:
        raise OptionError(f"--devices are unlike ({now}), so bits of features may differ; add --allow-other-device")
    if known and not here <= known and not config.allow_other_device:
        meaning = "bits of features may differ between devices"
        raise StaleCacheError("device", was, now, meaning, f"extend it on {was}, or add --allow-other-device")
    return tuple(sorted(known | here))


def check_array_names(dataset: Dataset) -> None:
    """Raises DatasetError for a camera or low-dim key whose name cannot be a folder name."""
    for name in (*dataset.cameras, *dataset.low_dim):
        if name in ("", ".", "..", "zarr.json") or "/" in name or "\0" in name or len(name.encode()) > MAX_NAME_BYTES:
            raise DatasetError(
                f"{dataset.files[0].path}: the obs key {name!r} cannot be a folder of a cache; choose others with "
                f"--cameras and --low-dim-keys; {available([*dataset.cameras, *dataset.low_dim])}"
            )


def metadata_digests(prepared: Prepared) -> dict[str, str]:
    """Returns digests of the metadata (the root group's aside) and weight files; weights are read from the disk."""
    found = {name: digest(content) for name, content in metadata_files(prepared.manifest).items()}
    weights = {file: digest(prepared.store.read(file)) for file in prepared.manifest.encoders.values()}
    return {**found, **weights}
