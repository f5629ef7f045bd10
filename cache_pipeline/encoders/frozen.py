"""The fast path of a frozen encoder."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_pipeline.encoders.folded import FoldedTrunk, can_fold
from cache_pipeline.encoders.identity import encoder_identity
from cache_pipeline.encoders.image_encoder import ImageEncoder, with_declared
from cache_pipeline.encoders.precision import DTYPES, computing_in, resolve_precision
from cache_pipeline.encoders.preprocess import Preprocess, preprocess
from cache_pipeline.encoders.resnet import ResNet
from cache_pipeline.encoders.views import View

CPU_BATCH, CPU_BATCH_PIXELS = 64, 64 * 224 * 224
CUDA_BATCH, CUDA_BATCH_PIXELS = 1024, 1024 * 128 * 128


class FrozenEncoder:
    """Maps frames to features at the cut, without gradients.

    Holds its own copy of the weights: later training of ``encoder`` has no effect. ResNets run with folded BatchNorm;
    other modules run unchanged in the chosen precision.

    Args:
        encoder: the encoder; its cut is used.
        preprocess: preprocessing of frames; a size and normalisation declared by the encoder are filled in.
        device: device to run on.
        precision: ``auto``, ``fp32``, ``tf32``, ``bf16`` or ``fp16``.

    Attributes:
        precision: the resolved precision, never ``auto``.
        preprocess: the preprocessing with declared values.

    Raises:
        EncoderError: the device does not support the precision.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        preprocess: Preprocess,
        device: str | torch.device = "cpu",
        precision: str = "auto",
    ) -> None:
        self.device = torch.device(device)
        self.precision = resolve_precision(precision, self.device)
        self.preprocess = with_declared(encoder, preprocess)
        self.encoder = copy.deepcopy(encoder).cpu().requires_grad_(False).eval()
        self._trunk = _fast_trunk(self.encoder, self.device, DTYPES[self.precision])

    def in_precision(self, precision: str) -> FrozenEncoder:
        """Returns the same encoder in another precision; raises as the constructor."""
        other = copy.copy(self)
        other.precision = resolve_precision(precision, self.device)
        other._trunk = _fast_trunk(self.encoder, self.device, DTYPES[other.precision])
        return other

    def __call__(self, frames: NDArray[np.uint8] | Tensor, view: View | None = None) -> Tensor:
        """Encodes a batch.

        Args:
            frames: (B,H,W,3) uint8 or float on 0–1, on any device.
            view: one augmentation for all frames, or one per frame; None: the clean view.

        Returns:
            (B,D) or (B,D,h,w) float32 on the device.
        """
        with torch.inference_mode(), computing_in(self.precision, self.device):
            images = torch.as_tensor(frames).to(self.device, non_blocking=True)
            return self._trunk(preprocess(images, self.preprocess, view))

    def feature_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of a feature at the cut for frames of ``image_shape``, (H, W, 3)."""
        return self.encoder.feature_shape(*self.preprocess.output_shape(image_shape[0], image_shape[1]))

    def identity(self, image_shape: tuple[int, ...]) -> dict[str, Any]:
        """Returns the identity of the features as JSON; see ``encoder_identity``."""
        return encoder_identity(self.encoder, self.preprocess, self.precision, image_shape, self._digest)

    @functools.cached_property
    def _digest(self) -> str:
        return self.encoder.trunk_digest()


def _fast_trunk(encoder: ImageEncoder, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    if can_fold(encoder.net):
        assert isinstance(encoder.net, ResNet)
        return FoldedTrunk(encoder.net, encoder.cut, device, dtype)
    ready = copy.deepcopy(encoder).to(device, dtype)
    ready = ready.to(memory_format=torch.channels_last)
    return lambda images: ready.trunk(images.to(dtype)).float()


def frozen_encoders(
    encoders: Mapping[str, ImageEncoder],
    preprocess: Mapping[str, Preprocess],
    device: torch.device,
    precision: str,
) -> dict[str, FrozenEncoder]:
    """Builds the fast path of each camera; cameras with the same encoder and preprocessing share it."""
    made: dict[tuple[int, Preprocess], FrozenEncoder] = {}
    by_camera: dict[str, FrozenEncoder] = {}
    for camera, encoder in encoders.items():
        key = (id(encoder), preprocess[camera])
        if key not in made:
            made[key] = FrozenEncoder(encoder, preprocess[camera], device, precision)
        by_camera[camera] = made[key]
    return by_camera


def preferred_batch_size(device: torch.device | str, pixels: int) -> int:
    """Returns a batch size at which frames encode fast with little memory.

    Args:
        device: where they are encoded.
        pixels: height times width of an image as the encoder gets it. Large images make smaller batches, since a
            ResNet's feature maps take about 150 bytes per pixel.
    """
    cuda = torch.device(device).type == "cuda"
    most, in_all = (CUDA_BATCH, CUDA_BATCH_PIXELS) if cuda else (CPU_BATCH, CPU_BATCH_PIXELS)
    return max(1, min(most, in_all // pixels))
