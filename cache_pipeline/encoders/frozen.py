"""The fast path: an encoder that never learns, run as the device likes it."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_pipeline.encoders.identity import encoder_identity
from cache_pipeline.encoders.image_encoder import ImageEncoder
from cache_pipeline.encoders.precision import resolve_precision
from cache_pipeline.encoders.preprocess import Preprocess, preprocess
from cache_pipeline.encoders.views import View

logger = logging.getLogger("cache_pipeline")


class FrozenEncoder:
    def __init__(
        self, encoder: ImageEncoder, preprocess: Preprocess, device: str | torch.device = "cpu", precision: str = "auto"
    ) -> None:
        self.device = torch.device(device)
        self.preprocess = preprocess
        self.precision = resolve_precision(precision, self.device)
        self.encoder = copy.deepcopy(encoder).eval().requires_grad_(False).to(self.device)

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray | Tensor, view: View | None = None) -> Tensor:
        frames = torch.as_tensor(frames).to(self.device, non_blocking=True)
        return self.encoder.trunk(preprocess(frames, self.preprocess, view)).float()

    def feature_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.encoder.feature_shape(*self.preprocess.output_shape(image_shape[0], image_shape[1]))

    def identity(self, image_shape: tuple[int, ...]) -> dict[str, Any]:
        return encoder_identity(self.encoder, self.preprocess, self.precision, image_shape)
