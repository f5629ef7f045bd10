"""Encodes the frames of one unit in batches of constant size, so a restart does not change any feature."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_pipeline.encoders.frozen import FrozenEncoder
from cache_pipeline.encoders.views import ViewParameters

logger = logging.getLogger("cache_pipeline")

DTYPES = {"float16": torch.float16, "float32": torch.float32}


class BatchEncoder:
    """Encodes units in batches of ``batch_size`` frames; halves the size permanently when memory runs out.

    The last batch of a unit is padded with its last frame, so all batches have the same size. The features of a demo
    then have the same bits, alone or with other demos.
    """

    def __init__(self, batch_size: int, dtype: str) -> None:
        self.batch_size = batch_size
        self.dtype = DTYPES[dtype]

    def __call__(
        self,
        encoder: FrozenEncoder,
        frames: NDArray[np.uint8],
        views: Sequence[ViewParameters] | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> NDArray:
        """Returns features (n, D) or (n, D, h, w) in the stored dtype.

        Args:
            encoder: the frozen encoder.
            frames: (n, H, W, 3).
            views: one augmentation per frame; None: the clean view.
            advance: called with the number of encoded frames after each batch.
        """
        images = torch.from_numpy(frames).to(encoder.device)
        while True:
            size, done = self.batch_size, []
            try:
                for start in range(0, len(images), size):
                    done.append(self._batch(encoder, images, views, start))
                    advance(len(done[-1]))
                return torch.cat(done).cpu().numpy()
            except RuntimeError as error:
                if not is_out_of_memory(error) or size == 1:
                    raise
            advance(-sum(map(len, done)))
            del done
            self._halve()

    def _batch(
        self, encoder: FrozenEncoder, images: Tensor, views: Sequence[ViewParameters] | None, start: int
    ) -> Tensor:
        size, total = self.batch_size, len(images)
        count = min(size, total - start)
        rows = torch.arange(start, start + size).clamp_(max=total - 1)
        batch = images[start : start + size] if count == size else images[rows.to(images.device)]
        chosen = None if views is None else [views[row] for row in rows.tolist()]
        return encoder(batch, chosen)[:count].to(self.dtype)

    def _halve(self) -> None:
        self.batch_size //= 2
        logger.warning("out of memory: batches of %d frames from now on", self.batch_size)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory, on a CUDA device or on the CPU."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "defaultcpuallocator" in text


def not_finite_row(features: NDArray) -> int | None:
    """Returns the first row with a NaN or infinite value, or None."""
    if np.isfinite(features.sum(dtype=np.float64)):
        return None
    finite = np.isfinite(features.reshape(len(features), -1)).all(axis=1)
    return int(np.argmin(finite)) if not finite.all() else None
