"""Resolves the device option."""

from __future__ import annotations

import torch

from cache_pipeline.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """Resolves a device name; ``auto`` is CUDA if available, else the CPU.

    Raises:
        ConfigError: unknown device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name!r} is not a device; available: auto, cpu, cuda, cuda:0") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices; write --device cpu")
    return device
