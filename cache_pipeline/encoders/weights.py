"""Downloads torchvision's weights, and computes the digest of weights."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cache_pipeline.errors import EncoderError, first_line
from cache_pipeline.files import DIGEST_BYTES

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
            f"cannot get torchvision's {name} weights from {url} ({first_line(error)}); give --weights FILE, "
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
