"""Compares the identity of a cache with the current settings; raises at the first difference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cache_pipeline.cache.manifest import CameraEntry, Manifest
from cache_pipeline.errors import StaleCacheError

MEND = "replace it with --overwrite, keep both with another --out, or give the options that it was made with"
NOT_COMPARED = ("weights.source",)
ORDER = ("architecture", "structure", "weights", "cut", "preprocess", "precision", "feature_shape")
MEANINGS = {
    "architecture": "its features come from another network",
    "structure": "the code of the custom encoder has changed",
    "cut": "its features come from another layer",
    "weights": "its features come from other weights",
    "preprocess": "its frames were resized, cropped or normalised differently",
    "precision": "its features were computed or stored in another precision",
    "feature_shape": "its features have another shape",
}


def check_camera(camera: str, cached: CameraEntry, wanted: CameraEntry) -> None:
    """Checks that a camera's features would be the same now. A different number of views is allowed.

    Raises:
        StaleCacheError: names the item, such as ``encoder.weights.digest`` or ``views.seed``.
    """
    if cached.image_shape != wanted.image_shape:
        meaning = f"frames of {camera} have another size in the dataset"
        raise StaleCacheError("image_shape", list(cached.image_shape), list(wanted.image_shape), meaning, MEND)
    for field, was, now in differences(cached.identity, wanted.identity):
        raise StaleCacheError(_title(field), was, now, f"{MEANINGS[field.split('.')[0]]} (camera {camera})", MEND)
    if cached.views > 1 and wanted.views > 1:
        for field, was, now in differences(cached.view_spec or {}, wanted.view_spec or {}):
            meaning = f"its {cached.views} views were drawn with other settings (camera {camera})"
            raise StaleCacheError(f"views.{field}", was, now, meaning, MEND)


def check_store(cached: Manifest, dtype: str, shard_rows: int | None) -> None:
    """Raises StaleCacheError for another stored dtype or shard size, which are fixed for a cache."""
    if cached.dtype != dtype:
        meaning = "its features are stored in another precision"
        raise StaleCacheError("precision.store", cached.dtype, dtype, meaning, MEND)
    if shard_rows is not None and cached.shard_rows != shard_rows:
        meaning = "its shards have another number of rows"
        raise StaleCacheError("shard_rows", cached.shard_rows, shard_rows, meaning, MEND)


def check_actions(cached: Manifest, keys: tuple[str, ...]) -> None:
    """Raises StaleCacheError for other action arrays, even of the same width."""
    if cached.action_keys != keys:
        meaning = "its actions come from other arrays of the dataset"
        raise StaleCacheError("action_key", list(cached.action_keys), list(keys), meaning, MEND)


def check_rows(cached: Manifest, low_dim: Mapping[str, Sequence[int]], action_dim: int) -> None:
    """Checks the width of actions and low-dim obs: arrays of a complete cache never change their shape.

    Raises:
        StaleCacheError: an array has another width. New and omitted keys are allowed.
    """
    widths = {"actions": ([cached.action_dim], [action_dim])}
    for key in sorted(set(cached.low_dim) & set(low_dim)):
        widths[f"low_dim.{key}"] = (list(cached.low_dim[key]), list(low_dim[key]))
    for name, (was, now) in widths.items():
        if was != now:
            raise StaleCacheError(f"{name} shape", was, now, "its rows have another width in the dataset", MEND)


def differences(cached: dict[str, Any], wanted: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yields every difference of two identities, causes first: (path such as ``weights.digest``, cached, wanted)."""
    flat_cached, flat_wanted = dict(_flatten(cached)), dict(_flatten(wanted))
    fields = sorted({*flat_cached, *flat_wanted}, key=lambda field: (_rank(field), field))
    for field in fields:
        was, now = flat_cached.get(field), flat_wanted.get(field)
        if was != now and field not in NOT_COMPARED:
            yield field, was, now


def _flatten(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _flatten(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _rank(field: str) -> int:
    head = field.split(".")[0]
    return ORDER.index(head) if head in ORDER else len(ORDER)


def _title(field: str) -> str:
    head = field.split(".")[0]
    return f"encoder.{field}" if head in ("architecture", "structure", "cut", "weights", "feature_shape") else field
