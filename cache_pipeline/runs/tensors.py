"""Reads and writes tensors as safetensors files with recorded digests; nothing is unpickled."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from cache_pipeline.errors import CheckpointError, described
from cache_pipeline.files import digest, remove, sync_file, sync_folder

if TYPE_CHECKING:
    from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Writes tensors to ``path``, synced to disk; returns the file's digest."""
    from cache_pipeline.encoders.saving import save_tensors

    save_tensors({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
    sync_file(path)
    return digest(path.read_bytes())


def read_tensors(path: Path, expected: str | None) -> dict[str, Tensor]:
    """Reads a file of ``write_tensors``; raises CheckpointError as ``check_tensors`` does."""
    from safetensors.torch import load_file

    check_tensors(path, expected)
    try:
        return load_file(path)
    except (RuntimeError, SafetensorError, OSError) as error:  # PyTorch maps the file into memory
        raise CheckpointError(f"{path} cannot be read: {described(error)}") from error


def check_tensors(path: Path, expected: str | None) -> None:
    """Raises CheckpointError if the file is missing, not a safetensors file, or its digest is not ``expected``."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; use another checkpoint of the run, or train again")
    if expected is not None and digest(path.read_bytes()) != expected:
        raise CheckpointError(f"{path} is damaged: its digest is not the recorded one; use another checkpoint")
    try:
        with safe_open(path, "np"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a valid safetensors file ({error}); use another checkpoint") from error


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Returns the name of the first tensor with a value that is not finite, else None."""
    import torch

    floats = ((name, value) for name, value in tensors.items() if value.is_floating_point())
    return next((name for name, value in floats if not bool(torch.isfinite(value).all())), None)


def place_folder(partial: Path, final: Path) -> None:
    """Renames a finished folder to ``final``; replaces an existing one."""
    sync_folder(partial)
    remove(final)
    os.rename(partial, final)
    sync_folder(final.parent)
