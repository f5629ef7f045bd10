"""The frozen encoder of each camera; cameras with the same encoder and preprocessing share one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from cache_pipeline.cache.manifest import CameraEntry, Manifest
from cache_pipeline.encoders.frozen import FrozenEncoder
from cache_pipeline.encoders.image_encoder import EncoderSpec, ImageEncoder, build_encoder
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.encoders.saving import load_encoder, save_encoder
from cache_pipeline.errors import ConfigError
from cache_pipeline.extract.config import ExtractConfig
from cache_pipeline.files import digest


class CameraEncoder(NamedTuple):
    """A camera's encoder as built, as it runs, and what it leaves in the manifest."""

    encoder: ImageEncoder
    frozen: FrozenEncoder
    entry: CameraEntry

    @property
    def file(self) -> str:
        """Where its weights lie inside a cache."""
        return f"encoder/{self.entry.identity['weights']['digest']}.safetensors"


def choose_device(text: str) -> torch.device:
    """``auto`` takes CUDA where there is one."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise ConfigError(f"--device {text!r} is no device; write auto, cpu, cuda or cuda:0") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {text} is not there: torch sees no CUDA device; write --device cpu")
    return device


def build_camera_encoders(
    config: ExtractConfig, cameras: Mapping[str, tuple[int, int, int]], cached: Manifest | None
) -> dict[str, CameraEncoder]:
    """Builds what encodes each camera.

    ``precision="auto"`` takes that of the cache where it has the camera, so that a cache begun on one machine can be
    extended on another.

    Args:
        config: what is asked for.
        cameras: camera → (H, W, 3).
        cached: the manifest so far.
    """
    device = choose_device(config.device)
    built: dict[EncoderSpec, ImageEncoder] = {}
    frozen: dict[tuple[EncoderSpec, Preprocess, str], FrozenEncoder] = {}
    found = {}
    for camera, image_shape in cameras.items():
        entry = cached.cameras.get(camera) if cached else None
        spec, preprocess = config.encoder_for(camera), config.preprocess_for(camera)
        precision = config.precision
        if precision == "auto" and entry is not None:
            precision = entry.identity["precision"]["compute"]
        key = (spec, preprocess, precision)
        if spec not in built:
            built[spec] = build_encoder(spec)
        if key not in frozen:
            frozen[key] = FrozenEncoder(built[spec], preprocess, device, precision)
        views = max(config.views, entry.views if entry else 1)
        found[camera] = CameraEncoder(
            built[spec],
            frozen[key],
            CameraEntry(
                tuple(frozen[key].feature_shape(image_shape)),
                image_shape,
                _as_json(frozen[key].identity(image_shape)),
                views,
                _view_spec(config, entry, views),
            ),
        )
    return found


def _view_spec(config: ExtractConfig, entry: CameraEntry | None, views: int) -> dict | None:
    if views == 1:
        return None
    if config.views == 1 and entry is not None:
        return entry.view_spec
    return _as_json(config.view_spec.to_json())


def _as_json(value: dict) -> dict:
    return json.loads(json.dumps(value))


def save_weights(path: Path, cameras: Mapping[str, CameraEncoder], known: Mapping[str, str]) -> None:
    """Writes the weights of every encoder, once each, unless they are there as ``known``: file → digest."""
    for camera in {camera.file: camera for camera in cameras.values()}.values():
        file = path / camera.file
        if not file.is_file() or digest(file.read_bytes()) != known.get(camera.file):
            file.parent.mkdir(parents=True, exist_ok=True)
            save_encoder(camera.encoder, file)


def restore_encoder(file: Path, entry: CameraEntry, device: torch.device) -> FrozenEncoder:
    """The frozen encoder that made a camera's features, from the weights that the cache carries."""
    preprocess = entry.identity["preprocess"]
    return FrozenEncoder(
        load_encoder(None, file), Preprocess.from_json(preprocess), device, entry.identity["precision"]["compute"]
    )
