"""What a training step computes in: the encoders that learn, and the linear layers of projection and action head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from cache_pipeline.encoders.precision import DTYPES, resolve_precision
from cache_pipeline.policies.visuomotor import VisuomotorPolicy
from cache_pipeline.training.packing import Packed


def set_precision(policy: VisuomotorPolicy, precision: str, device: torch.device) -> None:
    """Chooses what an encoder that learns computes in, and projection and action head with their float32 weights.

    On a GPU these are bound by the launches of their kernels, which bfloat16 only adds to.
    """
    dtype = DTYPES[resolve_precision(precision, device)]
    policy.encoder_dtype = None if dtype == torch.float32 else dtype
    policy.compute_dtype = dtype if dtype == torch.bfloat16 and device.type == "cpu" else None


def working_copies(policy: VisuomotorPolicy, packs: Sequence[Packed]) -> WorkingCopies:
    """Of all linear layers in projection and action head; of none if these compute in float32.

    Args:
        packs: with all parameters of these layers.
    """
    if policy.compute_dtype is None:
        return WorkingCopies((), (), torch.float32)
    parts = (policy.obs_encoder.projection, policy.policy)
    linears = (module for part in parts for module in part.modules() if isinstance(module, nn.Linear))
    return WorkingCopies(linears, packs, policy.compute_dtype)


class WorkingCopies:
    """Copies of layers' weights in a lower precision, which stand in for them in a step's forward and backward pass.

    Autocast makes the same copies, one by one and on the tape; the gradients are the same to the bit. After
    Micikevicius et al., Mixed Precision Training, 2018 (arXiv:1710.03740).

    Args:
        packs: with all parameters of ``layers``.
    """

    def __init__(self, layers: Iterable[nn.Linear], packs: Sequence[Packed], dtype: torch.dtype) -> None:
        self._packs = [(packed, packed.new(dtype)) for packed in packs]
        parts = {
            parameter: (packed, number, nn.Parameter(view))
            for packed, memory in self._packs
            for number, (parameter, view) in enumerate(zip(packed.parameters, packed.views(memory), strict=True))
        }
        self._places = [(layer._parameters, name) for layer in layers for name, _ in layer.named_parameters()]
        self._masters = [cast(nn.Parameter, named[name]) for named, name in self._places]
        self._homes = [parts[master][:2] for master in self._masters]
        self._copies = [parts[master][2] for master in self._masters]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the layers hold fresh copies without gradients."""
        with torch.no_grad():
            for packed, memory in self._packs:
                memory.copy_(packed.values)
        for copy in self._copies:
            copy.grad = None
        self._place(self._copies)
        try:
            yield
        finally:
            self._place(self._masters)

    def hand_over(self) -> None:
        """Adds the copies' gradients to those of the weights, in the weights' precision."""
        for (packed, number), copy in zip(self._homes, self._copies, strict=True):
            if copy.grad is not None:
                packed.add_gradient(number, copy.grad)
                copy.grad = None

    def _place(self, parameters: Sequence[nn.Parameter]) -> None:
        for (named, name), parameter in zip(self._places, parameters, strict=True):
            named[name] = parameter
