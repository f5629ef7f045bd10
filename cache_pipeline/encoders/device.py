"""The device that an option names."""

from __future__ import annotations

import torch

from cache_pipeline.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is some, else the CPU.

    Raises:
        ConfigError: no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name!r} is no device; available: auto, cpu, cuda, cuda:0") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices; write --device cpu")
    return device
