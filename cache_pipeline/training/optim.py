"""The optimiser's parameter groups, the learning-rate schedule, and the averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from cache_pipeline.errors import CheckpointError
from cache_pipeline.training.config import OptimConfig

Part = Literal["policy", "encoder"]
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Optimizer:
    """AdamW over named parameters, whose state is kept by parameter name so that groups may grow.

    Args:
        rates: peak learning rate of each part.
        steps: length of the schedule.
    """

    def __init__(self, config: OptimConfig, rates: Mapping[Part, float], steps: int, device: torch.device) -> None:
        self._config, self._rates, self._steps, self._device = config, dict(rates), steps, device
        self._warmup = min(config.warmup_steps, steps // 10)
        self._names: dict[nn.Parameter, str] = {}
        self._adam: torch.optim.AdamW | None = None

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Name → parameter, of all that learn."""
        return {name: parameter for parameter, name in self._names.items()}

    def add(self, part: Part, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Lets parameters learn from now on; those that learn already are left as they are."""
        fresh = [(name, parameter) for name, parameter in parameters if parameter not in self._names]
        for decayed in (True, False):
            chosen = [(name, parameter) for name, parameter in fresh if (parameter.dim() > 1) is decayed]
            if chosen:
                self._names.update({parameter: name for name, parameter in chosen})
                decay = self._config.weight_decay if decayed else 0.0
                self._add_group([parameter for _, parameter in chosen], part, decay)

    def step(self, number: int) -> None:
        """One update with the learning rate of step ``number``, counted from 0; gradients are clipped before."""
        assert self._adam is not None
        share = schedule(number, self._steps, self._warmup, self._config.min_lr_ratio)
        for group in self._adam.param_groups:
            group["lr"] = self._rates[group["part"]] * share
        if self._config.grad_clip is not None:
            self._clip(self._config.grad_clip)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """``<moment>/<parameter name>`` → tensor."""
        assert self._adam is not None
        state = self._adam.state
        return {
            f"{moment}/{name}": state[parameter][moment]
            for parameter, name in self._names.items()
            if parameter in state
            for moment in MOMENTS
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what ``tensors`` gave, for the parameters that learn now; raises CheckpointError on a misfit."""
        assert self._adam is not None
        for parameter, name in self._names.items():
            saved = {moment: tensors.get(f"{moment}/{name}") for moment in MOMENTS}
            if saved["step"] is None:
                continue
            for moment, value in saved.items():
                if value is None or (moment != "step" and value.shape != parameter.shape):
                    raise CheckpointError(f"the optimiser's state for {name} does not fit; start a new run")
            self._adam.state[parameter] = {
                moment: self._placed(parameter, moment, value) for moment, value in saved.items() if value is not None
            }

    def _clip(self, max_norm: float) -> None:
        """Lets the gradients' norm together be at most ``max_norm``, as torch's ``clip_grad_norm_`` does.

        The fused update divides gradients by a scale as it reads them, which saves the pass that would write them. On a
        CPU the norm can be looked at for nothing, and small gradients need not be divided at all.
        """
        found = [parameter for parameter in self._names if parameter.grad is not None]
        norm = nn.utils.get_total_norm([cast(Tensor, parameter.grad) for parameter in found])
        if not self._fused:
            nn.utils.clip_grads_with_norm_(found, max_norm, norm)
            return
        small = norm.device.type == "cpu" and bool(norm <= max_norm)
        self._adam.grad_scale = None if small else (norm / max_norm).clamp_(min=1.0)  # type: ignore[union-attr]

    def _placed(self, parameter: nn.Parameter, moment: str, value: Tensor) -> Tensor:
        """A copy on the device; moments in the memory format of their parameter, as the fused update needs them."""
        if moment == "step":
            return value.to(self._device if self._fused else "cpu", copy=True)
        return torch.empty_like(parameter, requires_grad=False).copy_(value)

    @property
    def _fused(self) -> bool:
        return self._device.type in ("cpu", "cuda")

    def _add_group(self, parameters: list[nn.Parameter], part: Part, decay: float) -> None:
        group: dict[str, Any] = {"params": parameters, "part": part, "weight_decay": decay}
        if self._adam is None:
            kind = {"fused": True} if self._fused else {"foreach": True}
            self._adam = torch.optim.AdamW([group], lr=self._rates[part], **kind)  # type: ignore[arg-type]
        else:
            self._adam.add_param_group(group)


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
