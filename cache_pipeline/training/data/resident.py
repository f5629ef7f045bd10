"""Resident source: the whole cache is on the device, and a batch is a few index selects without work per sample."""

from __future__ import annotations

from collections.abc import Generator, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_pipeline.policies.batch import Batch
from cache_pipeline.training.data.memory import piece_rows
from cache_pipeline.training.data.sampler import Plan
from cache_pipeline.training.data.source import CachedRows, Splits, take_rows, view_rows


class ResidentSource:
    """Holds features in their stored dtype, one tensor per camera; each batch is converted to float32.

    Args:
        rows: what is loaded.
        splits: windows of the two splits.
    """

    name = "resident"

    def __init__(self, rows: CachedRows, splits: Splits, device: torch.device) -> None:
        self._splits, self._device = splits, device
        self._n = len(rows.numbers)
        self._features = {camera: _load(rows, camera, device) for camera in rows.cameras}

    def batches(self, plans: Iterable[Plan], *, valid: bool = False) -> Generator[Batch, None, None]:
        split = self._splits[int(valid)]
        assert split is not None
        for plan in plans:
            places = torch.from_numpy(view_rows(plan, split.obs_rows, self._n)).to(self._device, non_blocking=True)
            features = {camera: take_rows(values, places).float() for camera, values in self._features.items()}
            yield split.batch(plan, features)

    def features_of(self, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        chosen = torch.from_numpy(rows).to(self._device)
        return {camera: values.index_select(0, chosen).cpu() for camera, values in self._features.items()}


def _load(rows: CachedRows, camera: str, device: torch.device) -> Tensor:
    """Loads (views·N, …) features, view after view, to the device, part by part."""
    cache, numbers, count = rows.cache, rows.numbers, len(rows.numbers)
    shape, dtype = cache.cameras[camera].feature_shape, np.dtype(cache.manifest.dtype)
    out = torch.empty(rows.views * count, *shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, device=device)
    step = piece_rows(len(out), out[:1].nbytes)
    for view in range(rows.views):
        for start in range(0, count, step):
            piece = torch.from_numpy(cache.features(camera, numbers[start : start + step], view))
            out[view * count + start : view * count + start + len(piece)].copy_(piece)
    return out
