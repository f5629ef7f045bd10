"""Parameters side by side in one piece of memory, where one elementwise operator takes them all.

The launches of an operator for each of a small policy's parameters are a tenth of its step. After the flat parameters
of Zhao et al., PyTorch FSDP, 2023 (arXiv:2304.11277).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

ALIGNED = 64  # elements: each parameter begins a cache line, in two bytes an element too


class Packed:
    """Moves parameters of one dtype into one piece of memory; they stay what they were, and become views of it.

    What gives a parameter other memory later, such as ``Module.to``, takes it out again.

    Attributes:
        names, parameters: in their order in memory.
        values: (n,) the memory; zeros lie between parameters.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.names, self.parameters = list(parameters), list(parameters.values())
        # Dense also where a parameter is not; in its memory format, as AdamW's fused update needs it.
        self._shapes = [(value.shape, torch.empty_like(value).stride()) for value in self.parameters]
        self._starts = [0]
        for value in self.parameters:
            self._starts.append(self._starts[-1] + -(-value.numel() // ALIGNED) * ALIGNED)
        self.values = self.new()
        for parameter, view in zip(self.parameters, self.views(self.values), strict=True):
            view.copy_(parameter.detach())
            parameter.data = view
        self._gradient: Tensor | None = None
        self._homes: list[Tensor] = []

    def new(self, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for something of each parameter, zero; in the parameters' dtype by default."""
        first = self.parameters[0]
        return torch.zeros(self._starts[-1], dtype=dtype or first.dtype, device=first.device)

    def views(self, memory: Tensor) -> list[Tensor]:
        """Each parameter's part of ``memory``, in its shape."""
        starts = self._starts[:-1]
        return [memory.as_strided(*shape, start) for shape, start in zip(self._shapes, starts, strict=True)]

    @property
    def gradients(self) -> list[Tensor]:
        """Those that there are."""
        return [value.grad for value in self.parameters if value.grad is not None]

    @property
    def whole_gradient(self) -> Tensor | None:
        """(n,) the gradients of all parameters; ``None`` unless all of them came by ``add_gradient``."""
        if not self._homes:
            return None
        inside = all(value.grad is home for value, home in zip(self.parameters, self._homes, strict=True))
        return self._gradient if inside else None

    def add_gradient(self, number: int, gradient: Tensor) -> None:
        """Adds to the gradient of parameter ``number``, which lies beside those of the others; any dtype."""
        if self._gradient is None:
            self._gradient = self.new()
            self._homes = self.views(self._gradient)
        parameter = self.parameters[number]
        if parameter.grad is None:
            parameter.grad = self._homes[number].copy_(gradient)
        else:
            parameter.grad.add_(gradient)

    def drop_gradients(self) -> None:
        """Leaves no parameter a gradient."""
        for parameter in self.parameters:
            parameter.grad = None
