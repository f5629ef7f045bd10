"""Resolves the device option."""

from __future__ import annotations

import torch

from cache_pipeline.errors import OptionError, available


def resolve_device(name: str) -> torch.device:
    """Resolves a device name; ``auto`` is CUDA if available, else the CPU.

    Raises:
        OptionError: a device that does not exist, or that torch does not reach here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise OptionError(f"--device {name!r} is not a device; {_usable()}") from error
    mps = device.type == "mps" and torch.backends.mps.is_available()
    if not (mps or device.type in ("cpu", "cuda")) or (device.type == "cpu" and device.index):
        raise OptionError(f"--device {name} is not supported; {_usable()}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices; {_usable()}")
    return device


def device_name(device: torch.device) -> str:
    """Returns ``cpu`` or the name of the GPU: devices of one name compute the same bits."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _usable() -> str:
    return available(["auto", "cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))])
