"""Checks that a checkpoint fits its data, and that cached features agree with live ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_pipeline.cache.manifest import CameraEntry
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.encoders.identity import COLLAPSED_SPREAD
from cache_pipeline.encoders.precision import error_over_variation
from cache_pipeline.errors import CheckpointError, StaleCacheError
from cache_pipeline.extract.matching import frame_digests
from cache_pipeline.policies.spec import PolicySpec
from cache_pipeline.policies.visuomotor import VisuomotorPolicy
from cache_pipeline.training.data.live import LiveSource
from cache_pipeline.training.data.run_data import DataShapes

logger = logging.getLogger("cache_pipeline")

# Largest allowed difference between cached and live features, as a multiple of the error measured at extraction.
ERROR_MARGIN = 3.0
# Error assumed for caches that record none: the tolerance of the extraction that made them.
UNRECORDED_ERROR = 0.1
# Difference that is always allowed: float32 sums in another order stay far below it.
LEAST_ALLOWED = 2e-3


def check_fits(spec: PolicySpec, checkpoint: Path, shapes: DataShapes) -> None:
    """Raises CheckpointError for the first difference between the policy's inputs and outputs and the data."""
    pairs: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = [
        ("images of camera", spec.cameras, shapes.cameras),
        ("rows of low-dim key", spec.low_dim, shapes.low_dim),
    ]
    for what, wanted, there in pairs:
        for name, shape in wanted.items():
            if name not in there or tuple(there[name]) != tuple(shape):
                found = tuple(there[name]) if name in there else "none"
                raise CheckpointError(
                    f"{checkpoint} does not fit the data: it takes {what} {name} of shape {tuple(shape)}, the data "
                    f"have {found}; give the dataset that it was trained on, or train a new run"
                )
    if spec.action_dim != shapes.action_dim:
        raise CheckpointError(
            f"{checkpoint} does not fit the data: it predicts {spec.action_dim} action dimensions, the data have "
            f"{shapes.action_dim}; give the dataset that it was trained on, or train a new run"
        )


def check_encoders(policy: VisuomotorPolicy, cache: FeatureCache) -> None:
    """Raises StaleCacheError unless the policy's encoders and preprocessing made the cache."""
    for camera in policy.cameras:
        identity = cache.cameras[camera].identity
        encoder, preprocess = policy.obs_encoder.key_model_map[camera], policy.obs_encoder.preprocessing[camera]
        pairs = [
            ("encoder.structure", identity.get("structure"), encoder.structure()),
            ("encoder.weights", identity["weights"]["digest"], encoder.trunk_digest(identity["cut"])),
            ("preprocess", identity["preprocess"], preprocess.to_json()),
        ]
        for field, cached, wanted in pairs:
            if cached != wanted:
                raise StaleCacheError(
                    f"{camera}: {field}",
                    cached,
                    wanted,
                    "its features differ from those that the run's policy was trained on",
                    "extract them again with --encoder-from RUN and the same --cut",
                )


def check_features(
    cache: FeatureCache, cache_rows: NDArray[np.int64], live: LiveSource, packed_rows: NDArray[np.int64]
) -> None:
    """Compares stored features with features computed now from the same frames in float32.

    Frames are compared by digest, features by their error as a fraction of their variation over frames. The bound
    is ``ERROR_MARGIN`` times the error that extraction measured and recorded, so a cache in bfloat16 passes and a
    cache of another encoder does not.

    Args:
        cache: the stored features, at the cut of the encoders of ``live``.
        cache_rows: (n,) rows of the cache.
        live: source of the frames.
        packed_rows: (n,) the same rows, numbered as in ``live``.

    Raises:
        CheckpointError: frames or features differ; the message names the camera and the cause.
    """
    for camera in live.cameras:
        _check_frames(cache, cache_rows, live, packed_rows, camera)
    features = live.features_of(packed_rows)
    for camera, exact in features.items():
        stored = torch.from_numpy(cache.features(camera, cache_rows)).float()
        error, allowed = compared(stored, exact, cache.cameras[camera])
        if not error <= allowed:
            raise CheckpointError(
                f"{camera}: the features in {cache.path} differ from live ones on {len(packed_rows)} frames by "
                f"{error:.2g} of their variation; {allowed:.2g} is allowed for their precision; the frames are equal, "
                f"so the encoder differs or the cache is damaged; check the cache with verify {cache.path}"
            )
        logger.info(
            "%s: cached and live features differ by %.1e of their variation (%.1e allowed)", camera, error, allowed
        )


def compared(stored: Tensor, exact: Tensor, entry: CameraEntry) -> tuple[float, float]:
    """Returns the error of stored features as a fraction of their variation over frames, and the largest allowed.

    The variation recorded in the cache is preferred: it covers many frames, while a few frames may look alike.
    """
    measured = entry.measured or {}
    spread = float(measured.get("spread", -1.0))
    recorded = float(measured.get("error_over_variation", -1.0))
    error = error_over_variation(stored, exact, spread if spread >= COLLAPSED_SPREAD else None)
    return error, max(LEAST_ALLOWED, ERROR_MARGIN * (recorded if recorded >= 0 else UNRECORDED_ERROR))


def _check_frames(
    cache: FeatureCache,
    cache_rows: NDArray[np.int64],
    live: LiveSource,
    packed_rows: NDArray[np.int64],
    camera: str,
) -> None:
    """Raises CheckpointError unless the frames are those that the cache was made from."""
    found = frame_digests(live.frames_of(camera, packed_rows))
    differ = (found != cache.frame_digests(camera, cache_rows)).any(1)
    if not differ.any():
        return
    others = [
        name
        for name in cache.cameras
        if name != camera and np.array_equal(found, cache.frame_digests(name, cache_rows))
    ]
    if others:
        cause = f"its frames are those of camera {others[0]} in the cache: the cameras were exchanged"
    else:
        cause = f"{int(differ.sum())} of {len(differ)} compared frames are not those that the cache was made from"
    raise CheckpointError(
        f"{camera}: {cause} ({cache.path}); give the dataset of the run with --dataset, or train a new run"
    )
