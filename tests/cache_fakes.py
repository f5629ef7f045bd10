"""A tiny encoder, and extraction with it: a cache of a fake dataset in a fraction of a second."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cache_pipeline.cache.manifest_store import read_manifest
from cache_pipeline.encoders.image_encoder import EncoderSpec
from cache_pipeline.extract.config import ExtractConfig
from cache_pipeline.extract.pipeline import ExtractResult, extract_features

CAMERA = "agentview_image"
OTHER = "robot0_eye_in_hand_image"
TINY = EncoderSpec(factory=f"{Path(__file__).resolve()}:tiny")
OTHER_WEIGHTS = EncoderSpec(factory=f"{Path(__file__).resolve()}:tiny_of_other_weights")
NARROW = EncoderSpec(factory=f"{Path(__file__).resolve()}:narrow")
OVERFLOWING = EncoderSpec(factory=f"{Path(__file__).resolve()}:overflowing")
SLOW = EncoderSpec(factory=f"{Path(__file__).resolve()}:slow")


class Tiny(nn.Module):
    """(B,3,h,w) → (B,width): a strided convolution, ReLU and the mean."""

    def __init__(self, seed: int, scale: float = 1.0, width: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 5, stride=4)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = torch.rand(parameter.shape, generator=generator) * scale

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(images)).mean((2, 3))


def tiny() -> nn.Module:
    return Tiny(0)


def tiny_of_other_weights() -> nn.Module:
    return Tiny(1)


def narrow() -> nn.Module:
    return Tiny(0, width=4)


class Slow(Tiny):
    """The tiny encoder, 20 ms later."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return super().forward(images)


def slow() -> nn.Module:
    return Slow(0)


def overflowing() -> nn.Module:
    return Tiny(0, scale=1e6)


def config(out: Path, *datasets: Path, **options: Any) -> ExtractConfig:
    """A config of the tiny encoder: shards of 16 rows, batches of 4 frames, on the CPU in float32."""
    tiny_options = {"encoders": TINY, "shard_rows": 16, "batch_size": 4, "device": "cpu", "precision": "fp32"}
    return ExtractConfig(datasets=datasets, out=out, **{**tiny_options, **options})


def extract(out: Path, *datasets: Path, **options: Any) -> ExtractResult:
    """Extracts with :func:`config`, quietly."""
    return extract_features(config(out, *datasets, **options), progress=False)


def outputs(path: Path) -> dict[str, Any]:
    """Everything that must be equal for two runs to be called the same: fingerprint, rows, digest of each unit."""
    manifest = read_manifest(path)
    return {"fingerprint": manifest.fingerprint, "demos": manifest.demos, "units": manifest.units}


def change_pixel(path: Path, demo: str, camera: str, frame: int) -> None:
    """Changes one pixel of a dataset."""
    import h5py

    with h5py.File(path, "r+") as file:
        images = file[f"data/{demo}/obs/{camera}"]
        changed = images[frame]
        changed[0, 0, 0] ^= 1
        images[frame] = changed


def equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit equality."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
