"""The optimiser's parameter groups, the learning-rate schedule, and the averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from cache_pipeline.errors import CheckpointError
from cache_pipeline.training.config import OptimConfig

Part = Literal["policy", "encoder"]
BETAS, EPS = (0.9, 0.999), 1e-8


@dataclass
class _Slot:
    """A parameter that learns, with the state that AdamW keeps of it."""

    name: str
    parameter: nn.Parameter
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor

    @property
    def moments(self) -> dict[str, Tensor]:
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "step": self.step}


@dataclass
class _Group:
    """Parameters of one peak learning rate and weight decay."""

    rate: float
    decay: float
    slots: list[_Slot]


class Optimizer:
    """AdamW over named parameters, whose state is kept by parameter name so that groups may grow.

    The update is torch's functional ``adamw``; what its Optimizer class does around it is a thirtieth of the step of a
    small policy.

    Args:
        rates: peak learning rate of each part.
        steps: length of the schedule.
    """

    def __init__(self, config: OptimConfig, rates: Mapping[Part, float], steps: int, device: torch.device) -> None:
        self._config, self._rates, self._steps = config, dict(rates), steps
        self._warmup = min(config.warmup_steps, steps // 10)
        self._groups: list[_Group] = []
        self._fused = device.type in ("cpu", "cuda")
        self._counter = device if self._fused else torch.device("cpu")

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Name → parameter, of all that learn."""
        return {slot.name: slot.parameter for slot in self._slots()}

    def add(self, part: Part, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Lets parameters learn from now on; those that learn already are left as they are."""
        known = set(self.parameters.values())
        fresh = [(name, parameter) for name, parameter in parameters if parameter not in known]
        for decayed in (True, False):
            slots = [self._slot(name, parameter) for name, parameter in fresh if (parameter.dim() > 1) is decayed]
            if slots:
                self._groups.append(_Group(self._rates[part], self._config.weight_decay if decayed else 0.0, slots))

    @torch.no_grad()
    def step(self, number: int) -> None:
        """One update with the learning rate of step ``number``, counted from 0; gradients are clipped before."""
        share = schedule(number, self._steps, self._warmup, self._config.min_lr_ratio)
        scale = None if self._config.grad_clip is None else self._clip(self._config.grad_clip)
        for group in self._groups:
            self._update(group, group.rate * share, scale)
        for slot in self._slots():
            slot.parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """``<moment>/<parameter name>`` → tensor."""
        return {f"{moment}/{slot.name}": value for slot in self._slots() for moment, value in slot.moments.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what ``tensors`` gave, for the parameters that learn now; raises CheckpointError on a misfit."""
        for slot in self._slots():
            saved = {moment: tensors.get(f"{moment}/{slot.name}") for moment in slot.moments}
            if saved["step"] is None:
                continue
            for moment, own in slot.moments.items():
                value = saved[moment]
                if value is None or value.shape != own.shape:
                    raise CheckpointError(f"the optimiser's state for {slot.name} does not fit; start a new run")
                own.copy_(value)

    def _update(self, group: _Group, rate: float, scale: Tensor | None) -> None:
        slots = [slot for slot in group.slots if slot.parameter.grad is not None]
        if slots:
            adamw(
                [slot.parameter for slot in slots],
                [slot.parameter.grad for slot in slots if slot.parameter.grad is not None],
                [slot.exp_avg for slot in slots],
                [slot.exp_avg_sq for slot in slots],
                [],
                [slot.step for slot in slots],
                fused=self._fused,
                foreach=not self._fused,
                grad_scale=scale,
                amsgrad=False,
                beta1=BETAS[0],
                beta2=BETAS[1],
                lr=rate,
                weight_decay=group.decay,
                eps=EPS,
                maximize=False,
            )

    def _clip(self, max_norm: float) -> Tensor | None:
        """Lets the gradients' norm together be at most ``max_norm``, as torch's ``clip_grad_norm_`` does.

        Returns:
            By what the fused update is to divide gradients as it reads them, which saves the pass that would write
            them. On a CPU the norm can be looked at for nothing, and small gradients need not be divided at all.
        """
        found = [slot.parameter for slot in self._slots() if slot.parameter.grad is not None]
        if not found:
            return None
        norms = torch._foreach_norm([parameter.grad for parameter in found if parameter.grad is not None])
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if not self._fused:
            nn.utils.clip_grads_with_norm_(found, max_norm, norm)
            return None
        small = norm.device.type == "cpu" and bool(norm <= max_norm)
        return None if small else (norm / max_norm).clamp_(min=1.0)

    def _slot(self, name: str, parameter: nn.Parameter) -> _Slot:
        """With moments in the memory format of their parameter, as the fused update needs them."""
        first, second = (torch.zeros_like(parameter, requires_grad=False) for _ in range(2))
        return _Slot(name, parameter, first, second, torch.zeros((), device=self._counter))

    def _slots(self) -> Iterator[_Slot]:
        return (slot for group in self._groups for slot in group.slots)


def schedule(step: int, steps: int, warmup: int, floor: float) -> float:
    """Share of the peak learning rate at ``step``: a linear rise, then a cosine down to ``floor``."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class AveragedWeights:
    """Exponential moving average of the parameters that learn; its decay rises from 0.1 as (1+n)/(10+n)."""

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._live: dict[str, Tensor] = {}
        self._average: dict[str, Tensor] = {}

    def add(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Starts the average of parameters that are new at their values now."""
        for name, parameter in parameters.items():
            if name not in self._average:
                self._live[name] = parameter
                self._average[name] = parameter.detach().clone()

    @torch.no_grad()
    def update(self, number: int) -> None:
        """Moves towards the weights after step ``number``, counted from 0."""
        decay = min(self._decay, (1 + number) / (10 + number))
        torch._foreach_lerp_(list(self._average.values()), list(self._live.values()), 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._average)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, value in self._average.items():
            if name not in tensors or tensors[name].shape != value.shape:
                raise CheckpointError(f"the averaged weights have no fitting {name}; start a new run")
            value.copy_(tensors[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Puts the average in the parameters' place for the time of a ``with`` block."""
        kept = {name: parameter.data for name, parameter in self._live.items()}
        try:
            for name, parameter in self._live.items():
                parameter.data = self._average[name]
            yield
        finally:
            for name, parameter in self._live.items():
                parameter.data = kept[name]
