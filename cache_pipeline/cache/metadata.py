"""The ``zarr.json`` files of a cache, through which zarr, xarray and tensorstore read it without this package.

Array metadata is written before the first unit. Root metadata is written after the last unit, just before the
manifest: its attributes list the demos, its consolidated metadata the shapes. Until then it describes the earlier
contents of the cache, which are still stored, or says that the extraction is unfinished.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import zarr
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from cache_pipeline.cache.arrays import MEND, ArraySpec, array_specs
from cache_pipeline.cache.layout import align_up, choose_chunk_rows
from cache_pipeline.cache.manifest import Manifest
from cache_pipeline.cache.manifest_store import write_manifest, write_pending
from cache_pipeline.cache.store import Place, store_at
from cache_pipeline.cache.store_protocol import Stamp
from cache_pipeline.cache.table import first_rows, lengths, names
from cache_pipeline.errors import CorruptCacheError
from cache_pipeline.files import digest

ROOT = "zarr.json"
TITLE = "features of a frozen image encoder, made by cache_pipeline"
ROWS = (
    "Demo i has the rows demo_starts[i] to demo_starts[i] + demo_lengths[i] - 1 of every array, one row per step. All "
    "other rows hold no demo: they fill up a shard, belonged to a demo that was removed, or are being written."
)
UNFINISHED = "The extraction has not finished: no row can be relied on. Run the same extract-features command again."
TABLE = (
    "a NumPy .npz file: row has demo_starts, length has demo_lengths, and demo i is called "
    "names[names_ends[i - 1]:names_ends[i]], in UTF-8"
)
AUTHORITY = "manifest.json decides what the cache holds; docs/cache-format.md describes it."
GROUPS = {
    "features": "output of the frozen encoder at the cut, one array per camera",
    "frame_digests": "digest of each frame that was encoded, one array per camera",
    "low_dim": "low-dimensional observations of the dataset, in its own units",
}
STEPS = {
    "actions": "action of each step, in the units of the dataset",
    "rewards": "reward of each step; NaN if the dataset has none",
    "dones": "1 where the dataset ends a demo, else 0; NaN if the dataset has none",
}
AXES = {
    "view": "0 is the frame as recorded; each other number is one fixed augmentation",
    "row": "one step of a demo; the attributes of the root group say which rows belong to which demo",
    "feature": "channel of the encoder's output",
    "h": "height of the feature map, from top to bottom",
    "w": "width of the feature map, from left to right",
    "action": "component of the action",
    "digest_byte": "byte of the digest",
}


def metadata_files(manifest: Manifest) -> dict[str, bytes]:
    """Returns the bytes of every ``zarr.json`` by path, without the root group's."""
    return {f"{path}/zarr.json": _json(node) for path, node in _nodes(manifest).items()}


def root_file(manifest: Manifest, *, complete: bool = True) -> bytes:
    """Returns the ``zarr.json`` of the root group, with the metadata of all arrays.

    Args:
        manifest: what the cache holds, or is to hold.
        complete: whether all its rows are stored; if not, the attributes list no demo.
    """
    nodes = {path: _consolidated(node) for path, node in _nodes(manifest).items()}
    metadata = {"kind": "inline", "must_understand": False, "metadata": nodes}
    return _json({**_group(_root_attributes(manifest, complete)), "consolidated_metadata": metadata})


def complete_cache(place: Place, manifest: Manifest, after: Stamp | None = None) -> None:
    """Completes a cache whose units are all recorded: writes the root group's metadata, then the manifest.

    After a kill in between, the manifest lists the old demos and the attributes the new ones. Rows of both are stored,
    and the next run writes the manifest.

    Args:
        after: as in :func:`write_manifest`.
    """
    content = root_file(manifest)
    manifest = replace(manifest, metadata={ROOT: digest(content), **manifest.metadata})
    write_pending(place, manifest)
    write_metadata(place, {ROOT: content})
    write_manifest(place, manifest, after)


def write_metadata(place: Place, files: dict[str, bytes]) -> None:
    """Writes each metadata file that is missing or differs; shards are not changed."""
    store = store_at(place)
    for name, content in files.items():
        try:
            if store.read(name) == content:
                continue
        except FileNotFoundError:
            pass
        store.write(name, content)


def check_metadata(place: Place, name: str, manifest: Manifest) -> None:
    """Raises CorruptCacheError if the ``zarr.json`` of an array does not match the manifest."""
    store, file = store_at(place), f"{name}/zarr.json"
    spec, lead = array_specs(manifest)[name], array_specs(manifest)[name].views
    try:
        stored = json.loads(store.read(file))
        shape, shard = stored["shape"], stored["chunk_grid"]["configuration"]["chunk_shape"]
        dtype = stored["data_type"]
        rows_at = 0 if lead is None else 1
        fits = (
            dtype == spec.dtype
            and shape[rows_at + 1 :] == list(spec.row_shape)
            and shape[rows_at] >= manifest.n_rows
            and shard[rows_at] == manifest.shard_rows
            and (lead is None or shape[0] >= lead)
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CorruptCacheError(f"{store.place}/{file} is missing or damaged ({error}); {MEND}") from error
    if not fits:
        raise CorruptCacheError(f"{store.place}/{file} has another shape or type than the manifest; {MEND}")


def dimension_names(manifest: Manifest) -> dict[str, tuple[str, ...]]:
    """Returns the axis names of each array. Axes of one name have one length, and no axis has the name of an array."""
    taken = {"actions", "rewards", "dones", *manifest.cameras, *manifest.low_dim}

    def free(name: str) -> str:
        while name in taken:
            name += "_"
        taken.add(name)
        return name

    row, action, byte = free("row"), free("action"), free("digest_byte")
    names: dict[str, tuple[str, ...]] = {"actions": (row, action), "rewards": (row,), "dones": (row,)}
    shared = free("view") if len({entry.views for entry in manifest.cameras.values()}) == 1 else None
    for camera, entry in manifest.cameras.items():
        axes = [free(f"{camera}_{axis}") for axis in ("feature", "h", "w")[: len(entry.feature_shape)]]
        names[f"features/{camera}"] = (shared or free(f"{camera}_view"), row, *axes)
        names[f"frame_digests/{camera}"] = (row, byte)
    for key, shape in manifest.low_dim.items():
        names[f"low_dim/{key}"] = (row, *(free(f"{key}_dim_{axis}") for axis in range(len(shape))))
    return names


def _nodes(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Returns the metadata of every array and group by path, without the root, in zarr's consolidation order."""
    nodes, names = {}, dimension_names(manifest)
    for path, spec in array_specs(manifest).items():
        group, _, _ = path.rpartition("/")
        if group:
            nodes[group] = _group({"description": GROUPS[group]})
        node = _array(spec, names[path], manifest.n_rows, manifest.shard_rows)
        nodes[path] = {**node, "attributes": _array_attributes(manifest, path)}
    return dict(sorted(nodes.items(), key=lambda item: (item[0].count("/"), item[0])))


def _array(spec: ArraySpec, names: tuple[str, ...], n_rows: int, shard_rows: int) -> dict[str, Any]:
    """Returns the metadata that zarr writes for an array; pure, so that files can be compared or rewritten."""
    rows = max(align_up(n_rows, shard_rows), shard_rows)
    lead = () if spec.views is None else (1,)
    stored: dict[str, Buffer] = {}
    zarr.create_array(
        MemoryStore(stored),
        shape=(*([spec.views] if spec.views is not None else []), rows, *spec.row_shape),
        shards=(*lead, shard_rows, *spec.row_shape),
        chunks=(*lead, choose_chunk_rows(spec.row_bytes, shard_rows), *spec.row_shape),
        dtype=spec.dtype,
        compressors=[Crc32cCodec()],
        fill_value=spec.fill,
        dimension_names=names,
        zarr_format=3,
    )
    node: dict[str, Any] = json.loads(stored["zarr.json"].to_bytes())
    return node


def _array_attributes(manifest: Manifest, path: str) -> dict[str, Any]:
    group, _, key = path.rpartition("/")
    if group == "features":
        entry = manifest.cameras[key]
        axes = ["view", "row", *("feature", "h", "w")[: len(entry.feature_shape)]]
        return {
            "description": f"output of the frozen encoder for each frame of {key}",
            "axes": [AXES[axis] for axis in axes],
            "camera": key,
            "image_shape": list(entry.image_shape),
            "architecture": entry.identity.get("architecture"),
            "cut": entry.identity.get("cut"),
            "weights_digest": entry.identity.get("weights", {}).get("digest"),
        }
    if group == "frame_digests":
        told = f"blake2b, 16 bytes, of each frame of {key}: uint8 (H, W, 3) in C order"
        return {"description": told, "axes": [AXES["row"], AXES["digest_byte"]], "camera": key}
    if group == "low_dim":
        axes = [AXES["row"], *("component of the observation" for _ in manifest.low_dim[key])]
        return {"description": f"observation {key}, in the units of the dataset", "axes": axes, "obs_key": key}
    axes = [AXES["row"], *([AXES["action"]] if path == "actions" else [])]
    return {"description": STEPS[path], "axes": axes}


def _root_attributes(manifest: Manifest, complete: bool) -> dict[str, Any]:
    common = {"title": TITLE, "format": manifest.format, "complete": complete}
    if not complete:
        return {**common, "comment": f"{UNFINISHED} {AUTHORITY}"}
    return {
        **common,
        "comment": f"{ROWS} {AUTHORITY}",
        "fingerprint": manifest.fingerprint,
        "demos": len(manifest.demos),
        "rows": manifest.rows,
        **_demo_lists(manifest),
        "filter_keys": {key: list(members) for key, members in manifest.masks.items()},
        "cameras": list(manifest.cameras),
        "views": {camera: entry.views for camera, entry in manifest.cameras.items()},
        "low_dim_keys": list(manifest.low_dim),
    }


def _demo_lists(manifest: Manifest) -> dict[str, Any]:
    if manifest.table is not None:
        return {"demo_table": manifest.table[0], "demo_columns": TABLE}
    return {
        "demo_names": names(manifest.demos),
        "demo_starts": first_rows(manifest.demos).tolist(),
        "demo_lengths": lengths(manifest.demos).tolist(),
    }


def _group(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"attributes": attributes, "zarr_format": 3, "node_type": "group"}


def _consolidated(node: dict[str, Any]) -> dict[str, Any]:
    """Returns a node in zarr's consolidated form: the root group lists all nodes, groups inside it list none."""
    if node["node_type"] == "array":
        return node
    return {**node, "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": {}}}


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2, allow_nan=False).encode()
