"""Encodes the frames of one unit in batches of constant size, so a restart does not change any feature."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_pipeline.encoders.frozen import FrozenEncoder
from cache_pipeline.encoders.views import ViewParameters
from cache_pipeline.extract.lanes import MAX_LANES, cpu_lanes

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
        self, encoder: FrozenEncoder, frames: NDArray[np.uint8], views: Sequence[ViewParameters] | None = None
    ) -> NDArray:
        """Returns features (n, D) or (n, D, h, w) in the stored dtype.

        Args:
            encoder: the frozen encoder.
            frames: (n, H, W, 3).
            views: one augmentation per frame; None: the clean view.
        """
        return self.start(encoder, frames, views).result()

    def start(
        self,
        encoder: FrozenEncoder,
        frames: NDArray[np.uint8],
        views: Sequence[ViewParameters] | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> Encoding:
        """Starts encoding, in lanes on a CPU; arguments as above.

        Args:
            advance: called with the number of encoded frames after each batch, while ``result`` waits.
        """
        return Encoding(self, encoder, frames, views, advance)

    def halve(self, too_large: int) -> None:
        """Sets half of a size that was too large, unless the current size is already smaller."""
        if self.batch_size >= too_large:
            self.batch_size = too_large // 2
            logger.warning("out of memory: batches of %d frames from now on", self.batch_size)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Encoding:
    """Features of a unit that is being encoded; made by ``BatchEncoder.start``."""

    def __init__(
        self,
        batches: BatchEncoder,
        encoder: FrozenEncoder,
        frames: NDArray[np.uint8],
        views: Sequence[ViewParameters] | None,
        advance: Callable[[int], None],
    ) -> None:
        self._batches, self._encoder, self._advance = batches, encoder, advance
        self._images = torch.from_numpy(frames).to(encoder.device)
        self._views = views
        self._futures: list[Future[Tensor]] = []
        self._waits = self._begin()

    def result(self) -> NDArray:
        """Waits for the features, (n, D) or (n, D, h, w) in the stored dtype."""
        while True:
            size, done = self._size, []
            try:
                for wait in self._waits:
                    done.append(wait())
                    self._advance(len(done[-1]))
                return torch.cat(done).cpu().numpy()
            except BaseException as error:
                self.cancel()
                if not is_out_of_memory(error) or size == 1:
                    raise
            self._advance(-sum(map(len, done)))
            del done
            self._batches.halve(size)
            self._waits = self._begin()

    @property
    def batches(self) -> int:
        """Number of batches that can run in parallel with those of other units; ``MAX_LANES`` without lanes."""
        return len(self._futures) if self._encoder.can_run_in_lanes else MAX_LANES

    def cancel(self) -> None:
        """Drops batches that have not started, and waits for the others."""
        for future in self._futures:
            if not future.cancel():
                future.exception()

    def _begin(self) -> list[Callable[[], Tensor]]:
        self._size = self._batches.batch_size
        encode = [partial(self._encode, start, self._size) for start in range(0, len(self._images), self._size)]
        if not self._encoder.can_run_in_lanes:
            return list(encode)
        lanes = cpu_lanes()
        self._futures = [lanes.submit(batch) for batch in encode]
        return [future.result for future in self._futures]

    def _encode(self, start: int, size: int) -> Tensor:
        total = len(self._images)
        count = min(size, total - start)
        rows = torch.arange(start, start + size).clamp_(max=total - 1)
        batch = self._images[start : start + size] if count == size else self._images[rows.to(self._images.device)]
        views = None if self._views is None else [self._views[row] for row in rows.tolist()]
        return self._encoder(batch, views)[:count].to(self._batches.dtype)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch ran out of memory, on a CUDA device or on the CPU."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "defaultcpuallocator" in text


def not_finite_row(features: NDArray) -> int | None:
    """Returns the first row with a NaN or infinite value, or None."""
    if np.isfinite(features.sum(dtype=np.float64)):
        return None
    finite = np.isfinite(features.reshape(len(features), -1)).all(axis=1)
    return int(np.argmin(finite)) if not finite.all() else None
