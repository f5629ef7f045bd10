"""Compares stored features with features encoded now from the source frames and the weights in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_pipeline.cache.manifest import CameraEntry
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.cache.store import Place
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.demos.remote import is_there
from cache_pipeline.encoders.device import resolve_device
from cache_pipeline.encoders.factory import Factories
from cache_pipeline.encoders.frozen import FrozenEncoder
from cache_pipeline.encoders.identity import COLLAPSED_SPREAD
from cache_pipeline.encoders.image_encoder import ImageEncoder
from cache_pipeline.encoders.precision import nearest_precision
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.encoders.view_spec import ViewSpec
from cache_pipeline.encoders.views import view_parameters
from cache_pipeline.errors import DatasetError, counted
from cache_pipeline.extract.camera_encoders import restore_encoders
from cache_pipeline.extract.encode import BatchEncoder
from cache_pipeline.extract.freshness import require_same_demos
from cache_pipeline.extract.matching import recorded_dataset
from cache_pipeline.text import by_name

TOLERANCE = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 5e-3, "bf16": 3e-2}
STORE_TOLERANCE = {"float32": 0.0, "float16": 1e-3}
# Factor of the tolerance if the device lacks the precision of the features: both precisions have an error.
OTHER_PRECISION = 2.0
# The error of a row may be this multiple of the error of all rows; the minimum covers differences between devices.
NOISE_FACTOR, LEAST_NOISE = 3.0, 2e-3


class VerifyResult(NamedTuple):
    """Differences between stored and live features.

    Attributes:
        rows: number of compared rows, over all cameras and views.
        max_abs: largest difference of one value.
        max_rel: largest difference of a row, as a fraction of the row's largest value.
        min_cosine: smallest cosine between stored and live row.
        tolerance: bound on ``max_rel`` for the precisions of computing and storing: the largest of all cameras. Each
            camera is compared with its own.
        ok: whether the bounds hold.
        error_over_variation: largest error of a row, as a fraction of the features' variation over frames; None if the
            cache does not record the variation.
        note: cameras that were encoded in another precision than the stored one, and why.
    """

    rows: int
    max_abs: float
    max_rel: float
    min_cosine: float
    tolerance: float
    ok: bool
    error_over_variation: float | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON object of the fields."""
        return self._asdict()

    def lines(self) -> list[str]:
        """For people."""
        seen = self.error_over_variation
        varied = "" if seen is None else f", {seen:.1e} of the variation over frames"
        line = (
            f"{counted(self.rows, 'row')}: stored and live features differ by {self.max_rel:.2e} relative at most "
            f"({self.max_abs:.2e} absolute{varied}, cosine at least {self.min_cosine:.6f}); tolerance "
            f"{self.tolerance:.0e}: {'ok' if self.ok else 'NOT ok'}"
        )
        return [line, self.note] if self.note else [line]


class _Compared(NamedTuple):
    """One view of one camera: stored and live rows (n, D), and bounds on their difference.

    Attributes:
        tolerance: bound on a row's largest difference, as a fraction of its largest value.
        spread: the features' variation over frames, as a fraction of their size; None if it was not measured.
        noise: bound on a row's error, as a fraction of that variation.
    """

    stored: Tensor
    live: Tensor
    tolerance: float
    spread: float | None
    noise: float

    def result(self) -> VerifyResult:
        difference = self.stored - self.live
        scale = self.live.abs().amax(1).clamp_min(1e-12)
        max_rel = float((difference.abs().amax(1) / scale).max())
        cosine = float(torch.cosine_similarity(self.stored, self.live, dim=1, eps=1e-12).min())
        error = self._error_over_variation(difference)
        ok = max_rel <= self.tolerance and (error is None or error <= self.noise)
        return VerifyResult(
            len(difference), float(difference.abs().max()), max_rel, min(1.0, cosine), self.tolerance, ok, error
        )

    def _error_over_variation(self, difference: Tensor) -> float | None:
        if self.spread is None:
            return None
        size = self.live.norm(dim=1).square().mean().sqrt()
        return float((difference.norm(dim=1) / (self.spread * size).clamp_min(1e-12)).max())


def verify(
    cache_path: Place,
    *,
    datasets: Sequence[str | Path] | None = None,
    rows: int = 64,
    seed: int = 0,
    device: str = "auto",
    encoder: Factories = None,
) -> VerifyResult:
    """Encodes random rows of every camera and view again and compares them with the stored features.

    Args:
        cache_path: a complete cache.
        datasets: the source files, if they are not at their recorded paths.
        rows: random rows per camera and view.
        seed: seed of the choice of rows.
        device: device of the encoder.
        encoder: factory of the cache's custom encoder, ``file.py:factory``. A factory runs only if it is named here.

    Raises:
        EncoderError: the cache was made by a factory that is not named or has changed.
        DatasetError: source files are missing, or a demo of the cache has changed in them.
    """
    cache = FeatureCache(cache_path)
    encoders = restore_encoders(cache, encoder)
    dataset = _source(cache, datasets)
    sources = require_same_demos(cache, dataset)
    rng = np.random.default_rng(seed)
    packed = np.sort(rng.choice(int(cache.lengths.sum()), min(rows, int(cache.lengths.sum())), replace=False))
    demos = np.searchsorted(cache.packed_starts, packed, side="right") - 1
    offsets = packed - cache.packed_starts[demos]
    results: list[VerifyResult] = []
    notes: dict[str, str] = {}
    batches = BatchEncoder(cache.manifest.batch_size, "float32")
    for camera, entry in cache.cameras.items():
        frozen = _frozen(encoders[camera], entry, device)
        frames = dataset.gather(camera, [(sources[d], t, t + 1) for d, t in zip(demos, offsets.tolist(), strict=True)])
        spec = ViewSpec.from_json(entry.view_spec or {})
        keys = [cache.demos[demo].view_key for demo in demos]
        bounds = _bounds(entry, frozen.precision, cache.manifest.dtype)
        recorded = entry.identity["precision"]["compute"]
        if frozen.precision != recorded:
            where = f"{frozen.device} lacks {recorded}"
            notes[camera] = f"{where}, so frames were encoded in {frozen.precision} (tolerance {bounds[0]:.0e})"
        for view in range(entry.views):
            views = [view_parameters(spec, key, camera, view) for key in keys] if view else None
            stored = _rows(cache.features(camera, cache.starts[demos] + offsets, view))
            results.append(_Compared(stored, _rows(batches(frozen, frames, views)), *bounds).result())
    return _together(results)._replace(note="; ".join(by_name(notes, "camera")))


def _rows(features: NDArray) -> Tensor:
    return torch.from_numpy(features).flatten(1).double()


def _bounds(entry: CameraEntry, precision: str, dtype: str) -> tuple[float, float | None, float]:
    """Returns tolerance, spread and noise of one camera encoded in ``precision``; see ``_Compared``."""
    recorded = entry.identity["precision"]["compute"]
    tolerance = TOLERANCE[recorded] * (OTHER_PRECISION if precision != recorded else 1) + STORE_TOLERANCE[dtype]
    measured = entry.measured or {}
    spread, error = measured.get("spread", -1.0), measured.get("error_over_variation", -1.0)
    if spread < COLLAPSED_SPREAD or error < 0:
        return tolerance, None, 0.0
    return tolerance, spread, NOISE_FACTOR * error + LEAST_NOISE


def _together(results: Sequence[VerifyResult]) -> VerifyResult:
    errors = [result.error_over_variation for result in results if result.error_over_variation is not None]
    return VerifyResult(
        rows=sum(result.rows for result in results),
        max_abs=max(result.max_abs for result in results),
        max_rel=max(result.max_rel for result in results),
        min_cosine=min(result.min_cosine for result in results),
        tolerance=max(result.tolerance for result in results),
        ok=all(result.ok for result in results),
        error_over_variation=max(errors) if errors else None,
    )


def _frozen(encoder: ImageEncoder, entry: CameraEntry, device: str) -> FrozenEncoder:
    """Builds the encoder in the precision of the features, or in fp32 if the device lacks it."""
    preprocess, where = Preprocess.from_json(entry.identity["preprocess"]), resolve_device(device)
    return FrozenEncoder(encoder, preprocess, where, nearest_precision(entry.identity["precision"]["compute"], where))


def _source(cache: FeatureCache, datasets: Sequence[str | Path] | None) -> Dataset:
    if not datasets and (dataset := recorded_dataset(cache.manifest)) is not None:
        return dataset
    paths = list(datasets) if datasets else [source.path for source in cache.manifest.files]
    gone = [path for path in paths if not is_there(path)]
    if gone:
        raise DatasetError(f"{gone[0]}, the source of {cache.path}, is missing; name the file with --dataset FILE")
    return Dataset.open(
        paths,
        cameras=tuple(cache.cameras),
        low_dim_keys=tuple(cache.low_dim),
        action_key=cache.manifest.action_keys,
    )
