"""Downloads and reads encoder weights, and computes their digest. Only tensors are ever unpickled."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cache_pipeline.errors import EncoderError
from cache_pipeline.files import DIGEST_BYTES
from cache_pipeline.text import listed

STATE_KEYS = ("state_dict", "model_state_dict", "model", "net", "encoder", "backbone")
COUNTER = "num_batches_tracked"


def imagenet_state(name: str) -> dict[str, Tensor]:
    """Returns torchvision's IMAGENET1K_V1 weights of a ResNet, downloaded once into torch's hub folder.

    The name of torchvision's file contains the first digits of its SHA-256. A file in the folder is checked against
    them before it is read; torch itself checks only downloads.

    Raises:
        EncoderError: the download failed, or the file in the folder has another SHA-256.
    """
    url = _imagenet_url(name)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    _check_sha256(folder / os.path.basename(url), imagenet_sha256(name), name)
    try:
        return torch.hub.load_state_dict_from_url(url, progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        file = os.path.basename(url)
        raise EncoderError(
            f"cannot get torchvision's {name} weights from {url} ({_first_line(error)}); give --weights FILE, "
            f"or place {file} in {folder}, or use random weights with --no-pretrained-encoder --seed N"
        ) from error


def has_imagenet_file(name: str) -> bool:
    """Whether torchvision's IMAGENET1K_V1 file of a ResNet lies in torch's hub folder."""
    return (Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(_imagenet_url(name))).is_file()


def imagenet_sha256(name: str) -> str:
    """Returns the first digits of the SHA-256 of torchvision's IMAGENET1K_V1 file, from the file's name."""
    return Path(_imagenet_url(name)).stem.rpartition("-")[2]


def _imagenet_url(name: str) -> str:
    from torchvision.models import get_model_weights

    url: str = get_model_weights(name)["IMAGENET1K_V1"].url
    return url


def _check_sha256(path: Path, start: str, name: str) -> None:
    if not path.is_file():
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(start):
        raise EncoderError(
            f"{path} is not torchvision's {name}: its SHA-256 begins with {found[: len(start)]}, not {start}; "
            f"remove it to download the original, or move it and use it with --weights FILE"
        )


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads the tensors of a ``.safetensors`` or torch (``.pth``, ``.pt``, …) file, the latter with ``weights_only``.

    Finds a state dict that is nested under one of ``STATE_KEYS``.

    Raises:
        EncoderError: the file is missing, has another format, or has no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise EncoderError(f"there is no weights file {path}; give a .pth or .safetensors file with --weights FILE")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise EncoderError(
            f"cannot read weights from {path} ({_first_line(error)}); "
            f"give a plain state dict saved with torch.save or as .safetensors"
        ) from error
    return _find_state(loaded, path)


def _find_state(value: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(value, Mapping):
        tensors = {str(key): item for key, item in value.items() if isinstance(item, Tensor)}
        if tensors:
            return tensors
        for key in STATE_KEYS:
            if key in value:
                return _find_state(value[key], path)
        keys = listed(value, limit=8) or "nothing"
    else:
        keys = f"a {type(value).__name__}"
    raise EncoderError(f"{path} holds no state dict but {keys}; save model.state_dict() and give that file")


def strip_prefix(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Extracts the ResNet of a state dict and removes its prefix, such as ``module.`` or ``backbone.``.

    Raises:
        EncoderError: the state dict contains no ResNet or several.
    """
    marks = ("conv1.weight", "bn1.weight", "layer1.0.conv1.weight")
    ends = (name.removesuffix(marks[0]) for name in state if name.endswith(marks[0]))
    prefixes = [prefix for prefix in ends if all(prefix + mark in state for mark in marks)]
    if len(prefixes) != 1:
        found = listed(prefixes) if prefixes else listed(state, limit=6)
        what = "several ResNets, under the prefixes" if prefixes else "no ResNet; its tensors are named"
        raise EncoderError(f"{source} holds {what} {found}; save the state dict of one ResNet and give that file")
    (prefix,) = prefixes
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Returns a digest of names, dtypes, shapes and values; a float16 state and its float32 copy have the same digest.

    Includes BatchNorm statistics but not its batch counter. Independent of device, order and file.
    """
    hasher = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name in sorted(state):
        if name.endswith(COUNTER):
            continue
        value = state[name].detach().cpu()
        value = value.float() if value.is_floating_point() else value
        hasher.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        hasher.update(value.contiguous().numpy().tobytes())
    return hasher.hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
