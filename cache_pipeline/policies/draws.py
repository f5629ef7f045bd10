"""Draws random numbers for some windows of a batch, equal to those of the whole batch.

The loss then does not depend on how the batch is divided: into parts that fit the memory, or among processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor


class Share(NamedTuple):
    """Windows ``start`` to ``stop`` of a batch of ``total``; every share draws the numbers of the whole batch."""

    generator: torch.Generator
    start: int
    stop: int
    total: int


Draws: TypeAlias = torch.Generator | Share | None
"""Source of random numbers; ``None`` is torch's global generator."""


def normal(shape: tuple[int, ...], draws: Draws, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draws standard normal values; the first axis has one row, or a fixed number of rows, per window."""
    return _draw(torch.randn, shape, draws, device, dtype)


def uniform(shape: tuple[int, ...], draws: Draws, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draws values from [0, 1); shape as in ``normal``."""
    return _draw(torch.rand, shape, draws, device, dtype)


def _draw(
    function: Callable[..., Tensor], shape: tuple[int, ...], draws: Draws, device: torch.device, dtype: torch.dtype
) -> Tensor:
    if not isinstance(draws, Share):
        return function(shape, generator=draws, device=device, dtype=dtype)
    each, rest = divmod(shape[0], draws.stop - draws.start)
    assert not rest, (shape, draws)
    drawn = function((draws.total * each, *shape[1:]), generator=draws.generator, device=device, dtype=dtype)
    return drawn[draws.start * each : draws.stop * each]
