"""What a training step computes in: the encoders that learn, and the linear layers of projection and action head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from cache_pipeline.encoders.precision import DTYPES, resolve_precision
from cache_pipeline.policies.visuomotor import VisuomotorPolicy


def set_precision(policy: VisuomotorPolicy, precision: str, device: torch.device) -> None:
    """Chooses what an encoder that learns computes in, and projection and action head with their float32 weights.

    On a GPU these are bound by the launches of their kernels, which bfloat16 only adds to.
    """
    dtype = DTYPES[resolve_precision(precision, device)]
    policy.encoder_dtype = None if dtype == torch.float32 else dtype
    policy.compute_dtype = dtype if dtype == torch.bfloat16 and device.type == "cpu" else None


def working_copies(policy: VisuomotorPolicy) -> WorkingCopies:
    """Of all linear layers in projection and action head; of none if these compute in float32."""
    if policy.compute_dtype is None:
        return WorkingCopies((), torch.float32)
    parts = (policy.obs_encoder.projection, policy.policy)
    linears = (module for part in parts for module in part.modules() if isinstance(module, nn.Linear))
    return WorkingCopies(linears, policy.compute_dtype)


class WorkingCopies:
    """Copies of layers' weights in a lower precision, which stand in for them in a step's forward and backward pass.

    Autocast makes the same copies, one by one and on the tape; the gradients are the same to the bit. After
    Micikevicius et al., Mixed Precision Training, 2018 (arXiv:1710.03740).
    """

    def __init__(self, layers: Iterable[nn.Linear], dtype: torch.dtype) -> None:
        self._places = [(layer._parameters, name) for layer in layers for name, _ in layer.named_parameters()]
        self._masters = [cast(nn.Parameter, named[name]) for named, name in self._places]
        self._copies = [nn.Parameter(master.detach().to(dtype)) for master in self._masters]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the layers hold fresh copies without gradients."""
        with torch.no_grad():
            for copy, master in zip(self._copies, self._masters, strict=True):
                copy.grad = None
                copy.copy_(master)
        self._place(self._copies)
        try:
            yield
        finally:
            self._place(self._masters)

    def hand_over(self) -> None:
        """Adds the copies' gradients to those of the weights, in the weights' precision."""
        for master, copy in zip(self._masters, self._copies, strict=True):
            if copy.grad is not None:
                gradient = copy.grad.to(master.dtype)
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                copy.grad = None

    def _place(self, parameters: Sequence[nn.Parameter]) -> None:
        for (named, name), parameter in zip(self._places, parameters, strict=True):
            named[name] = parameter
