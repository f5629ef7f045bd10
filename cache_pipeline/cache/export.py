"""Exports features for other tools: as low-dim obs of a robomimic HDF5 file, or as one .npz file."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.cache.store import Place
from cache_pipeline.errors import CacheError, DatasetError
from cache_pipeline.files import FileKind, check_output, output_file
from cache_pipeline.hdf5 import group_attributes, holds_hdf5, new_hdf5
from cache_pipeline.text import SHOWN_NAMES, few, shortened

FINGERPRINT = "feature_cache_fingerprint"


def _is_feature_hdf5(path: Path) -> bool:
    try:
        return holds_hdf5(path) and FINGERPRINT in (group_attributes(path) or {})
    except DatasetError:
        return False


def _is_feature_npz(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return {"demos.npy", "starts.npy", "actions.npy"} <= set(archive.namelist())


FEATURE_HDF5 = FileKind("an HDF5 file that cache export wrote", _is_feature_hdf5)
FEATURE_NPZ = FileKind("an .npz file that cache export wrote", _is_feature_npz)


class ExportResult(NamedTuple):
    """Result of an export.

    Attributes:
        keys: obs key or array → shape of one row.
    """

    path: str
    demos: int
    rows: int
    bytes: int
    keys: dict[str, tuple[int, ...]]

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as a JSON object."""
        return {**self._asdict(), "keys": {key: list(shape) for key, shape in self.keys.items()}}

    def lines(self) -> list[str]:
        """For people."""
        keys = [f"  {shortened(key)} {'×'.join(map(str, shape)) or '1'}" for key, shape in self.keys.items()]
        head = f"{self.path}: {self.demos} demos, {self.rows} rows, {self.bytes / 1e6:.1f} MB"
        return [head, *few(keys, "key", SHOWN_NAMES, "--json lists all")]


def feature_key(camera: str, view: int = 0) -> str:
    """Returns the obs key of one view of a camera's features: ``agentview_image`` → ``agentview_feature``."""
    stem = camera.removesuffix("_image")
    return f"{stem}_feature" if view == 0 else f"{stem}_feature_view{view}"


def export_robomimic(
    cache_path: Place, out_path: str | Path, *, views: bool = False, overwrite: bool = False
) -> ExportResult:
    """Writes a robomimic HDF5 with the demos of a cache: features, flattened to float32, as low-dim obs.

    Any robomimic script trains on it with these keys under ``observation.modalities.obs.low_dim``. ``next_obs`` is
    ``obs`` shifted by one step; the last step of a demo repeats its own obs.

    Args:
        cache_path: a complete cache.
        out_path: the HDF5 file.
        views: write every view; by default only the clean one is written.
        overwrite: replace an existing file.

    Raises:
        ConfigError: the file exists already, or is none that an export wrote.
        CacheError: two obs would share a key, or the disk is full.
    """
    cache, out = FeatureCache(cache_path), Path(out_path)
    sources = _sources(cache)
    check_output(out, FEATURE_HDF5, overwrite=overwrite, sources=sources)
    features = {
        feature_key(camera, view): (camera, view)
        for camera, entry in cache.cameras.items()
        for view in range(entry.views if views else 1)
    }
    keys = [feature_key(camera) for camera in cache.cameras]
    clash = [key for key in features if key in cache.low_dim or keys.count(key) > 1]
    if clash:
        raise CacheError(f"{cache.path}: two obs would share the key {clash[0]}; export as .npz keeps them apart")
    widths = [int(np.prod(cache.cameras[camera].feature_shape)) for camera, _ in features.values()]
    widths += [int(np.prod(shape)) for shape in cache.low_dim.values()]
    needed = 4 * int(cache.lengths.sum()) * (2 * sum(widths) + cache.action_dim)
    with (
        output_file(out, FEATURE_HDF5, overwrite=overwrite, sources=sources, needed=needed) as partial,
        new_hdf5(partial) as (file, check_written),
    ):
        data = file.create_group("data")
        data.attrs["total"] = int(cache.lengths.sum())
        data.attrs["env_args"] = json.dumps(cache.env_args or {})
        if cache.render_flags is not None:
            data.attrs["render_flags"] = json.dumps(cache.render_flags)
        data.attrs[FINGERPRINT] = cache.fingerprint
        names = _demo_names(cache)
        for number, name in enumerate(names):
            _write_demo(data.create_group(name), cache, number, features)
            check_written()
        for key, members in cache.masks.items():
            file[f"mask/{key}"] = np.array([names[member].encode() for member in members])
    shapes = {key: (int(np.prod(cache.cameras[camera].feature_shape)),) for key, (camera, _) in features.items()}
    return ExportResult(str(out), len(names), int(cache.lengths.sum()), out.stat().st_size, {**shapes, **cache.low_dim})


def export_npz(cache_path: Place, out_path: str | Path, *, overwrite: bool = False) -> ExportResult:
    """Writes all live rows of a cache as one uncompressed ``.npz``.

    Arrays: ``features/<camera>`` (K, N, …), ``actions``, ``rewards``, ``dones``, ``low_dim/<key>``, ``starts`` and
    ``lengths`` (E,) of the demos, ``demos`` (E,) their names, and for each filter key ``mask/<key>``: the indices of
    its demos in ``demos``, ``starts`` and ``lengths``.

    Raises:
        ConfigError: the file exists already, or is none that an export wrote.
    """
    cache, out = FeatureCache(cache_path), Path(out_path)
    sources = _sources(cache)
    check_output(out, FEATURE_NPZ, overwrite=overwrite, sources=sources)
    values = {
        f"features/{camera}": np.stack([cache.features(camera, view=view) for view in range(entry.views)])
        for camera, entry in cache.cameras.items()
    }
    names = ["actions", "rewards", "dones", *(f"low_dim/{key}" for key in cache.low_dim)]
    values |= {name: cache.array(name) for name in names}
    shapes = {name: value.shape[2 if name.startswith("features/") else 1 :] for name, value in values.items()}
    values |= {"starts": cache.packed_starts, "lengths": cache.lengths}
    values["demos"] = np.array([demo.name for demo in cache.demos])
    values |= {f"mask/{key}": np.array(members, np.int64) for key, members in cache.masks.items()}
    needed = sum(value.nbytes for value in values.values())
    with (
        output_file(out, FEATURE_NPZ, overwrite=overwrite, sources=sources, needed=needed) as partial,
        zipfile.ZipFile(partial, "w") as archive,  # np.savez leaves its own open if a write fails
    ):
        for name, value in values.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.save(file, value, allow_pickle=False)
    return ExportResult(str(out), len(cache.demos), int(cache.lengths.sum()), out.stat().st_size, shapes)


def _sources(cache: FeatureCache) -> list[str]:
    """Returns the source files of the cache, which no export may replace."""
    files = cache.manifest.files
    return [source.path for source in files] + [path for source in files for path, _, _ in source.linked]


def _demo_names(cache: FeatureCache) -> list[str]:
    """Returns the names of the demos; all are renumbered if two files share a name."""
    names = [demo.name for demo in cache.demos]
    return names if len(set(names)) == len(names) else [f"demo_{number}" for number in range(len(names))]


def _write_demo(group: h5py.Group, cache: FeatureCache, number: int, features: dict[str, tuple[str, int]]) -> None:
    demo = cache.demos[number]
    rows = slice(demo.row, demo.row + demo.length)
    group.attrs["num_samples"] = demo.length
    group["actions"] = cache.array("actions", rows)
    for key in ("rewards", "dones"):
        values = cache.array(key, rows)
        if not np.isnan(values).any():
            group[key] = values
    obs = {key: cache.array(f"low_dim/{key}", rows) for key in cache.low_dim}
    for key, (camera, view) in features.items():
        obs[key] = cache.features(camera, rows, view).reshape(demo.length, -1).astype(np.float32)
    for key, values in obs.items():
        group[f"obs/{key}"] = values
        group[f"next_obs/{key}"] = np.concatenate([values[1:], values[-1:]])
