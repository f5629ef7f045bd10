"""Stored features against features encoded now, from the source frames and the weights that the cache carries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cache_pipeline.cache.manifest import CameraEntry
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.encoders.device import resolve_device
from cache_pipeline.encoders.factory import Factories
from cache_pipeline.encoders.frozen import FrozenEncoder
from cache_pipeline.encoders.image_encoder import ImageEncoder
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.encoders.views import ViewSpec, view_parameters
from cache_pipeline.errors import DatasetError
from cache_pipeline.extract.camera_encoders import restore_encoders
from cache_pipeline.extract.encode import BatchEncoder
from cache_pipeline.extract.freshness import require_same_demos

TOLERANCE = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 5e-3, "bf16": 3e-2}
STORE_TOLERANCE = {"float32": 0.0, "float16": 1e-3}


class VerifyResult(NamedTuple):
    """How far stored features are from live ones.

    Attributes:
        rows: compared, over all cameras and views.
        max_abs: largest difference of one value.
        max_rel: largest difference of a row, as a share of that row's largest value.
        min_cosine: smallest cosine between stored and live row.
        tolerance: bound on ``max_rel`` for the precisions of computing and storing.
        ok: whether the bound holds.
    """

    rows: int
    max_abs: float
    max_rel: float
    min_cosine: float
    tolerance: float
    ok: bool

    def to_json(self) -> dict[str, Any]:
        """A JSON object of the fields."""
        return self._asdict()

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{self.rows} rows: stored and live features differ by {self.max_rel:.2e} relative at most "
            f"({self.max_abs:.2e} absolute, cosine at least {self.min_cosine:.6f}); tolerance {self.tolerance:.0e}: "
            f"{'ok' if self.ok else 'NOT ok'}"
        ]


def verify(
    cache_path: str | Path,
    *,
    datasets: Sequence[str | Path] | None = None,
    rows: int = 64,
    seed: int = 0,
    device: str = "auto",
    encoder: Factories = None,
) -> VerifyResult:
    """Encodes random rows of every camera and view again and compares.

    Args:
        cache_path: a complete cache.
        datasets: the source files, where they no longer lie at their recorded paths.
        rows: random rows per camera and view.
        seed: of the choice of rows.
        device: to encode on.
        encoder: the factory of a cache that was made by one: ``file.py:factory``. It runs only if it is named here.

    Raises:
        EncoderError: the cache was made by a factory that is not named, or that has changed.
        DatasetError: the source files are not there, or a demo of the cache is not in them unchanged.
    """
    cache = FeatureCache(cache_path)
    encoders = restore_encoders(cache, encoder)
    dataset = _source(cache, datasets)
    sources = require_same_demos(cache, dataset)
    rng = np.random.default_rng(seed)
    packed = np.sort(rng.choice(int(cache.lengths.sum()), min(rows, int(cache.lengths.sum())), replace=False))
    demos = np.searchsorted(cache.packed_starts, packed, side="right") - 1
    offsets = packed - cache.packed_starts[demos]
    pairs, tolerance = [], 0.0
    batches = BatchEncoder(cache.manifest.batch_size, "float32")
    for camera, entry in cache.cameras.items():
        frozen = _frozen(encoders[camera], entry, device)
        pieces = [dataset.frames(sources[d], camera, t, t + 1) for d, t in zip(demos, offsets, strict=True)]
        frames = np.concatenate(pieces)
        spec = ViewSpec.from_json(entry.view_spec or {})
        keys = [cache.demos[demo].view_key for demo in demos]
        for view in range(entry.views):
            views = [view_parameters(spec, key, camera, view) for key in keys] if view else None
            stored = cache.features(camera, cache.starts[demos] + offsets, view)
            pairs.append((stored, batches(frozen, frames, views)))
        tolerance = max(tolerance, TOLERANCE[entry.identity["precision"]["compute"]])
    return _compare(pairs, tolerance + STORE_TOLERANCE[cache.manifest.dtype])


def _frozen(encoder: ImageEncoder, entry: CameraEntry, device: str) -> FrozenEncoder:
    preprocess = Preprocess.from_json(entry.identity["preprocess"])
    return FrozenEncoder(encoder, preprocess, resolve_device(device), entry.identity["precision"]["compute"])


def _source(cache: FeatureCache, datasets: Sequence[str | Path] | None) -> Dataset:
    paths = [Path(path) for path in datasets] if datasets else [Path(s.path) for s in cache.manifest.files]
    gone = [path for path in paths if not path.is_file()]
    if gone:
        raise DatasetError(f"{gone[0]}, the source of {cache.path}, is not there; name the file with --dataset FILE")
    return Dataset.open(paths, cameras=tuple(cache.cameras), low_dim_keys=tuple(cache.low_dim))


def _compare(pairs: Sequence[tuple[NDArray, NDArray]], tolerance: float) -> VerifyResult:
    max_abs, max_rel, min_cosine, count = 0.0, 0.0, 1.0, 0
    for stored, live in pairs:
        a = torch.from_numpy(stored).flatten(1).double()
        b = torch.from_numpy(live).flatten(1).double()
        difference = (a - b).abs().amax(1)
        scale = b.abs().amax(1).clamp_min(1e-12)
        max_abs = max(max_abs, float(difference.max()))
        max_rel = max(max_rel, float((difference / scale).max()))
        min_cosine = min(min_cosine, float(torch.cosine_similarity(a, b, dim=1, eps=1e-12).min()))
        count += len(a)
    ok = bool(np.isfinite(max_rel)) and max_rel <= tolerance
    return VerifyResult(count, max_abs, max_rel, min_cosine, tolerance, ok)
