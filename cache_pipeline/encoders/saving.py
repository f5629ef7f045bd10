"""An encoder's weights on disk, from which it can be made again without the file or download they came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cache_pipeline.encoders.image_encoder import EncoderSpec, ImageEncoder, build_encoder
from cache_pipeline.encoders.resnet import get_resnet
from cache_pipeline.errors import EncoderError
from cache_pipeline.files import atomic_path


def save_encoder(encoder: ImageEncoder, path: str | Path) -> None:
    """Writes all weights of an encoder as safetensors, atomically, with its spec in the file's metadata."""
    state = {name: value.detach().contiguous() for name, value in encoder.state_dict().items()}
    spec = None if encoder.spec is None else encoder.spec.to_json()
    # One key: safetensors writes several in random order, and files of the same encoder are to be the same bytes.
    metadata = {"encoder": json.dumps({"spec": spec, "source": encoder.source})}
    with atomic_path(path) as partial:
        save_tensors(state, partial, metadata)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes tensors as safetensors; raises OSError where they cannot be written, as on a full disk."""
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def load_encoder(spec: EncoderSpec | Mapping[str, Any] | None, path: str | Path) -> ImageEncoder:
    """Makes an encoder again from its spec and the file of ``save_encoder``, wherever its weights first came from.

    Args:
        spec: the spec or its JSON; ``None`` takes the one in the file.
        path: the weights.

    Raises:
        EncoderError: the file is missing or damaged, does not fit, or no spec is to be had.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("encoder", "{}"))
        state = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise EncoderError(f"cannot read the encoder's weights from {path} ({error})") from error
    spec = spec if spec is not None else metadata.get("spec")
    if spec is None:
        raise EncoderError(
            f"{path} was saved from a ready module, which cannot be made again; give it as --encoder FILE:FACTORY"
        )
    encoder = _structure(spec if isinstance(spec, EncoderSpec) else EncoderSpec.from_json(spec))
    encoder.source = metadata.get("source", encoder.source)
    try:
        encoder.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise EncoderError(f"{path} does not hold the weights of {encoder.architecture} ({reason})") from error
    return encoder.eval()


def _structure(spec: EncoderSpec) -> ImageEncoder:
    if spec.factory is not None:
        return build_encoder(spec)
    with torch.random.fork_rng(devices=[]):
        net = get_resnet(spec.rgb_model_name, use_group_norm=spec.use_group_norm)
    return ImageEncoder(net, spec.cut, source=spec.source, spec=spec)
