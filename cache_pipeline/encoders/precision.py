"""Precisions of computing, the devices that support them, and their error."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cache_pipeline.errors import EncoderError, available

PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AMPERE = (8, 0)

logger = logging.getLogger(__name__)


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX) and torch has oneDNN."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def emulates(device: torch.device, precision: str) -> bool:
    """Whether a device computes in ``precision`` only by converting from and to fp32, which is slower than fp32."""
    return precision == "bf16" and device.type == "cpu" and not cpu_has_bf16()


def resolve_precision(precision: str, device: torch.device) -> str:
    """Resolves a precision to ``fp32``, ``tf32``, ``bf16`` or ``fp16``.

    ``auto`` is bf16 on hardware that multiplies it (CUDA from Ampere on, CPUs with AVX512-BF16 or AMX), fp16 on older
    CUDA devices, otherwise fp32. bf16 on a CPU that does not multiply it is allowed, and logs one warning.

    Raises:
        EncoderError: unknown precision, or not supported by this device.
    """
    if precision not in PRECISIONS:
        raise EncoderError(f"there is no precision {precision!r}; {available(PRECISIONS, precision)}")
    if precision in ("tf32", "fp16") and device.type == "cpu":
        raise EncoderError(f"--precision {precision} needs a CUDA device; on a CPU take fp32 or bf16")
    if precision in ("tf32", "bf16") and device.type == "cuda" and torch.cuda.get_device_capability(device) < AMPERE:
        raise EncoderError(
            f"--precision {precision} needs a CUDA device of compute capability 8.0 or more; take fp32 or fp16"
        )
    if emulates(device, precision):
        _warn_of_slow_bf16()
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= AMPERE else "fp16"
    return "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"


@functools.cache
def _warn_of_slow_bf16() -> None:
    """Logs once per process."""
    logger.warning("this CPU has no bfloat16 arithmetic: bf16 is several times slower than fp32 here")


def nearest_precision(precision: str, device: torch.device) -> str:
    """Returns ``precision`` if the device supports it, else ``fp32``."""
    try:
        return resolve_precision(precision, device)
    except EncoderError:
        return "fp32"


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Returns the dtype of ``torch.autocast`` for a resolved precision; None for fp32 and tf32."""
    dtype = DTYPES[precision]
    return None if dtype == torch.float32 else dtype


@contextmanager
def computing_in(precision: str, device: torch.device) -> Iterator[None]:
    """Sets torch's TF32 flags inside the block: on for ``tf32``, off for all other precisions, and restores them.

    torch's defaults differ: cuDNN convolutions use TF32. The flags belong to the process. Nested use with the same
    precision changes nothing, so several threads may use it at the same time.
    """
    tf32 = precision == "tf32" and device.type == "cuda"
    before = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    wanted = ("high" if tf32 else "highest", tf32 if device.type == "cuda" else before[1])
    if before == wanted:
        yield
        return
    _set_float32(*wanted)
    try:
        yield
    finally:
        _set_float32(*before)


def _set_float32(products: str, convolutions_in_tf32: bool) -> None:
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions_in_tf32


def error_over_variation(features: Tensor, exact: Tensor, spread: float | None = None) -> float:
    """Returns ‖features − exact‖ / ‖exact − mean of exact over frames‖.

    Policies see features normalised over frames, so an error matters relative to their variation. For one frame the
    norm of ``exact`` replaces the variation. The variation is at least the rounding error of float32.

    Args:
        features, exact: (N, …) features of the same N frames.
        spread: ‖variation‖ / ‖exact‖ measured on more frames; default: measured on these frames.
    """
    features, exact = features.detach().double(), exact.detach().double()
    if spread is not None:
        variation = spread * exact.norm()
    else:
        variation = (exact - exact.mean(0) if len(exact) > 1 else exact).norm()
    least = torch.finfo(torch.float32).eps * exact.norm() + torch.finfo(torch.float64).tiny
    return float((features - exact).norm() / torch.maximum(variation, least))
