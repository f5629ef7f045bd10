"""Whether a checkpoint fits the data that it is to be used with, and whether features made now are those in a cache."""

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

# A cache's features may be this many times farther from live ones than their error that was measured at extraction.
ERROR_MARGIN = 3.0
# The error of caches that do not record theirs: what extraction allowed when they were made.
UNRECORDED_ERROR = 0.1
# Of float32 arithmetic in another order, far above what was ever seen.
LEAST_ALLOWED = 2e-3


def check_fits(spec: PolicySpec, checkpoint: Path, shapes: DataShapes) -> None:
    """Raises CheckpointError naming the first difference between what the policy takes and what the data hold."""
    pairs: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = [
        ("images of camera", spec.cameras, shapes.cameras),
        ("rows of low-dim key", spec.low_dim, shapes.low_dim),
    ]
    for what, wanted, there in pairs:
        for name, shape in wanted.items():
            if name not in there or tuple(there[name]) != tuple(shape):
                found = tuple(there[name]) if name in there else "none"
                raise CheckpointError(
                    f"{checkpoint} does not fit the data: it takes {what} {name} of shape {tuple(shape)}, they have "
                    f"{found}; give the dataset that it was trained on, or train anew"
                )
    if spec.action_dim != shapes.action_dim:
        raise CheckpointError(
            f"{checkpoint} does not fit the data: it predicts {spec.action_dim} action dimensions, the data have "
            f"{shapes.action_dim}; give the dataset that it was trained on, or train anew"
        )


def check_encoders(policy: VisuomotorPolicy, cache: FeatureCache) -> None:
    """Raises StaleCacheError unless the cache was made by the policy's encoders with its preprocessing."""
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
                    "its features are not those that the run's policy was trained on",
                    "extract them again with --encoder-from RUN and the same --cut",
                )


def check_features(
    cache: FeatureCache, cache_rows: NDArray[np.int64], live: LiveSource, packed_rows: NDArray[np.int64]
) -> None:
    """Compares stored features with features that are made now from the same frames in float32.

    Frames are compared by digest, features by their error as a share of their variation over these frames. The bound
    is ``ERROR_MARGIN`` times the error that extraction measured and recorded, so a cache in bfloat16 passes and a
    cache of another encoder does not.

    Args:
        cache: the stored features, at the cut of the encoders of ``live``.
        cache_rows: (n,) rows of the cache.
        live: where the frames are.
        packed_rows: (n,) the same rows as ``live`` counts them.

    Raises:
        CheckpointError: frames or features differ; the message names camera and cause.
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
                f"{error:.2g} of their variation, and {allowed:.2g} is allowed for their precision; the frames are the "
                f"same, so the encoder or the cache is not; check the cache with verify {cache.path}"
            )
        logger.info(
            "%s: cached and live features differ by %.1e of their variation (%.1e allowed)", camera, error, allowed
        )


def compared(stored: Tensor, exact: Tensor, entry: CameraEntry) -> tuple[float, float]:
    """The error of stored features as a share of their variation over frames, and the largest that is allowed.

    The variation is that of many frames, where the cache records it: a few frames may look alike.
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
    """Raises CheckpointError unless the frames now are those that the cache was made from."""
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
        f"{camera}: {cause} ({cache.path}); give the dataset that the run was trained on with --dataset, or train anew"
    )
