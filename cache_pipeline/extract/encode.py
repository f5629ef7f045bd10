"""Encoding the frames of one unit: in batches of one size, so that restarts leave no trace."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from cache_pipeline.encoders.frozen import FrozenEncoder
from cache_pipeline.encoders.views import ViewParameters

logger = logging.getLogger("cache_pipeline")

DTYPES = {"float16": torch.float16, "float32": torch.float32}


class BatchEncoder:
    """Encodes units in batches of ``batch_size`` frames; halves it, for good, when memory does not suffice.

    The last batch of a unit is filled up with its last frame: every batch has the same size, whatever the unit holds,
    so that a demo's features are the same bits whether it was encoded alone or among others.
    """

    def __init__(self, batch_size: int, dtype: str) -> None:
        self.batch_size = batch_size
        self._dtype = DTYPES[dtype]

    def __call__(
        self,
        encoder: FrozenEncoder,
        frames: NDArray[np.uint8],
        views: Sequence[ViewParameters] | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> NDArray:
        """Features (n, D) or (n, D, h, w) in the stored dtype.

        Args:
            encoder: frozen.
            frames: (n, H, W, 3).
            views: one augmentation per frame; None for the clean view.
            advance: told the frames done, batch by batch.
        """
        done = 0

        def count(batch: int) -> None:
            nonlocal done
            done += batch
            advance(batch)

        while True:
            try:
                return self._encode(encoder, frames, views, count)
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.batch_size == 1:
                    raise
                logger.warning("out of memory: batches of %d frames from now on", self.batch_size // 2)
            advance(-done)
            done = 0
            self.batch_size //= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _encode(
        self,
        encoder: FrozenEncoder,
        frames: NDArray[np.uint8],
        views: Sequence[ViewParameters] | None,
        advance: Callable[[int], None],
    ) -> NDArray:
        size, total = self.batch_size, len(frames)
        images = torch.from_numpy(frames).to(encoder.device)
        features: torch.Tensor | None = None
        for start in range(0, total, size):
            stop = min(start + size, total)
            rows = torch.arange(start, start + size).clamp_(max=total - 1)
            batch = images[start:stop] if stop - start == size else images[rows.to(images.device)]
            batch_views = None if views is None else [views[row] for row in rows.tolist()]
            encoded = encoder(batch, batch_views)
            if features is None:
                features = torch.empty((total, *encoded.shape[1:]), dtype=self._dtype, device=encoded.device)
            features[start:stop] = encoded[: stop - start]
            advance(stop - start)
        assert features is not None
        return features.cpu().numpy()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory, on a CUDA device or on the CPU."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "defaultcpuallocator" in text


def not_finite_row(features: NDArray) -> int | None:
    """The first row with a NaN or an infinite value, or None."""
    if np.isfinite(features.sum(dtype=np.float64)):
        return None
    finite = np.isfinite(features.reshape(len(features), -1)).all(axis=1)
    return int(np.argmin(finite)) if not finite.all() else None
