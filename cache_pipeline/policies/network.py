"""The multilayer perceptron of all policies."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from cache_pipeline.errors import ConfigError


class FloatOutput(nn.Sequential):
    """Layers with float32 output, also if the weights have lower precision."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return result.float()


def mlp(inputs: int, hidden: Sequence[int], outputs: int) -> FloatOutput:
    """Builds linear layers of widths ``hidden`` with GELU between them."""
    widths = [inputs, *hidden]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.GELU()]
    return FloatOutput(*layers, nn.Linear(widths[-1], outputs))


def check_hidden(hidden: Sequence[int]) -> None:
    """Raises ConfigError unless ``hidden`` has at least one layer and only positive widths."""
    if not hidden or any(width < 1 for width in hidden):
        raise ConfigError(f"hidden is {list(hidden)}; give at least one positive layer width")
