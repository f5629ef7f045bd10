"""Random numbers for some windows of a batch, drawn as for the whole batch.

So a loss does not depend on how its batch was cut: into parts that fit the memory, or over processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor


class Share(NamedTuple):
    """The windows ``start`` to ``stop`` of a batch of ``total``; every share draws the numbers of all of them."""

    generator: torch.Generator
    start: int
    stop: int
    total: int


Draws: TypeAlias = torch.Generator | Share | None
"""Where random numbers come from; ``None`` is torch's own generator."""


def normal(shape: tuple[int, ...], draws: Draws, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values; the first axis counts windows, or a fixed number of rows for each of them."""
    return _draw(torch.randn, shape, draws, device, dtype)


def uniform(shape: tuple[int, ...], draws: Draws, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values from [0, 1); shape as for ``normal``."""
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
