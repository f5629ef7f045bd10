"""Tensors on disk: safetensors files that are written whole, listed with their digests, and never unpickled."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cache_pipeline.errors import CheckpointError
from cache_pipeline.files import digest


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Writes tensors to ``path``, synced to disk; returns the file's digest."""
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return digest(path.read_bytes())


def read_tensors(path: Path, expected: str | None) -> dict[str, Tensor]:
    """Reads what ``write_tensors`` wrote.

    Raises:
        CheckpointError: the file is missing, is no safetensors file, or its digest is not ``expected``.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; take another checkpoint of the run, or train again")
    if expected is not None and digest(path.read_bytes()) != expected:
        raise CheckpointError(f"{path} is damaged: its digest is not the recorded one; take another checkpoint")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no readable safetensors file ({error}); take another checkpoint") from error


def place_folder(partial: Path, final: Path) -> None:
    """Moves a finished folder to its name, in place of one that is there."""
    _sync_folder(partial)
    if final.exists():
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
        os.rename(partial, final)
        shutil.rmtree(old)
    else:
        os.rename(partial, final)
    _sync_folder(final.parent)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tensor_device(name: str) -> torch.device:
    """The device that ``name`` means; ``auto`` is a CUDA device if there is one."""
    from cache_pipeline.errors import ConfigError

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"there is no device {name!r}; available: auto, cpu, cuda, cuda:0") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name}: there are {torch.cuda.device_count()} CUDA devices; take --device cpu")
    return device
