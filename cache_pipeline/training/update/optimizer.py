"""The optimiser's parameter groups, the learning-rate schedule, and the averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from cache_pipeline.errors import CheckpointError
from cache_pipeline.training.config import OptimConfig

Component = Literal["policy", "encoder"]
FUSED = ("cpu", "cuda")
SCALE, GROWTH = "scaler/scale", "scaler/growth_tracker"
RATE = "peak_rate/"


class Optimizer:
    """``torch.optim.AdamW`` over named parameters that may grow, with clipped gradients and a learning-rate schedule.

    In float16 the loss is scaled by ``torch.amp.GradScaler``, so that small gradients do not vanish.

    Args:
        rates: peak learning rate of each component.
        steps: length of the schedule.
        precision: of the forward and backward pass.
    """

    def __init__(
        self,
        config: OptimConfig,
        rates: Mapping[Component, float],
        steps: int,
        *,
        device: torch.device | None = None,
        precision: str = "fp32",
    ) -> None:
        self._config, self._rates, self._steps = config, dict(rates), steps
        self._warmup = min(config.warmup_steps, steps // 10)
        self._device = torch.device("cpu") if device is None else device
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=precision == "fp16")
        self._adamw = torch.optim.AdamW([{"params": []}], fused=self._device.type in FUSED)
        self._adamw.param_groups.clear()
        self.parameters: dict[str, nn.Parameter] = {}

    def add(self, component: Component, parameters: Iterable[tuple[str, nn.Parameter]], start: int = 0) -> None:
        """Trains parameters from step ``start`` on; parameters that are already trained are unchanged.

        Their learning rate has a warm-up of its own from there: Adam's first steps are as large as the rate, however
        small the gradient is.
        """
        known = set(self.parameters.values())
        fresh = {name: parameter for name, parameter in parameters if parameter not in known}
        self.parameters |= fresh
        for decayed in (True, False):
            chosen = [parameter for parameter in fresh.values() if (parameter.dim() > 1) is decayed]
            decay = self._config.weight_decay if decayed else 0.0
            if chosen:
                self._adamw.add_param_group(
                    {"params": chosen, "weight_decay": decay, "component": component, "start": start}
                )

    def current_rates(self) -> dict[Component, float]:
        """The learning rate of each component that is trained, as of the last step."""
        return {group["component"]: group["lr"] for group in reversed(self._adamw.param_groups)}

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss whose gradient :meth:`step` expects: ``loss`` itself but for float16."""
        return self._scaler.scale(loss)

    def step(self, number: int) -> None:
        """Makes update ``number``, counted from 0; gradients are clipped before, and dropped after."""
        factor = schedule(number, self._steps, self._warmup, self._config.min_lr_ratio)
        for group in self._adamw.param_groups:
            late = group["start"] > 0 and self._warmup > 0
            warmup = min(1.0, (number - group["start"] + 1) / self._warmup) if late else 1.0
            group["lr"] = self._rates[group["component"]] * (factor * warmup)
        self._scaler.unscale_(self._adamw)
        if self._config.grad_clip is not None:
            self._clip(self._config.grad_clip)
        self._scaler.step(self._adamw)
        self._scaler.update()
        self._adamw.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """``<moment>/<parameter name>``, ``peak_rate/<component>`` and the state of the loss scale → tensor."""
        found = {
            f"{moment}/{name}": value
            for name, parameter in self.parameters.items()
            for moment, value in self._adamw.state.get(parameter, {}).items()
        }
        found |= {f"{RATE}{name}": torch.tensor(rate, dtype=torch.float64) for name, rate in self._rates.items()}
        if self._scaler.is_enabled():
            scaler = self._scaler.state_dict()
            found |= {SCALE: torch.tensor(scaler["scale"]), GROWTH: torch.tensor(scaler["_growth_tracker"])}
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads the value of ``tensors`` for the parameters in training; raises CheckpointError on a mismatch."""
        for component in self._rates:
            if f"{RATE}{component}" not in tensors:
                raise CheckpointError("the checkpoint is of an earlier version and cannot be resumed; start a new run")
            self._rates[component] = float(tensors[f"{RATE}{component}"])
        for name, parameter in self.parameters.items():
            if f"step/{name}" in tensors:
                self._load_state(name, parameter, tensors)
        if self._scaler.is_enabled() and SCALE in tensors:
            own = self._scaler.state_dict()
            own |= {"scale": float(tensors[SCALE]), "_growth_tracker": int(tensors[GROWTH])}
            self._scaler.load_state_dict(own)

    def _clip(self, max_norm: float) -> None:
        """Does what ``clip_grad_norm_`` does; on a CPU, gradients that need no clipping are not written again."""
        learning = list(self.parameters.values())
        norm = nn.utils.get_total_norm([value.grad for value in learning if value.grad is not None])
        if self._device.type != "cpu" or not norm <= max_norm:
            nn.utils.clip_grads_with_norm_(learning, max_norm, norm)

    def _load_state(self, name: str, parameter: nn.Parameter, tensors: Mapping[str, Tensor]) -> None:
        # In the parameter's memory format, as a fused update needs it.
        state = {moment: torch.zeros_like(parameter) for moment in ("exp_avg", "exp_avg_sq")}
        state["step"] = torch.zeros((), device=parameter.device if self._device.type in FUSED else None)
        for moment, value in state.items():
            saved = tensors.get(f"{moment}/{name}")
            if saved is None or saved.shape != value.shape:
                raise CheckpointError(f"the optimiser's state for {name} does not fit; start a new run")
            value.copy_(saved)
        self._adamw.state[parameter] = state


def schedule(step: int, steps: int, warmup: int, floor: float) -> float:
    """Factor of the peak learning rate at ``step``: a linear rise, then a cosine down to ``floor``."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class AveragedWeights:
    """Exponential moving average of the parameters that are trained; its decay rises from 0.1 as (1+n)/(10+n)."""

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._parameters: dict[str, nn.Parameter] = {}
        self._averages: list[Tensor] = []

    def add(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Adds new parameters to the average, starting from their current values."""
        for name, parameter in parameters.items():
            if name not in self._parameters:
                self._parameters[name] = parameter
                self._averages.append(parameter.detach().clone())

    @torch.no_grad()
    def update(self, number: int) -> None:
        """Updates the average with the weights after step ``number``, counted from 0."""
        decay = min(self._decay, (1 + number) / (10 + number))
        torch._foreach_lerp_(self._averages, list(self._parameters.values()), 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """Parameter name → its average."""
        return dict(zip(self._parameters, self._averages, strict=True))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads the value of ``tensors``; raises CheckpointError on a mismatch."""
        for name, value in self.tensors().items():
            if name not in tensors or tensors[name].shape != value.shape:
                raise CheckpointError(f"the averaged weights have no fitting {name}; start a new run")
            value.copy_(tensors[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replaces the parameters by their average within a ``with`` block."""
        own = [parameter.data for parameter in self._parameters.values()]
        try:
            self._put(self._averages)
            yield
        finally:
            self._put(own)

    def _put(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._parameters.values(), values, strict=True):
            parameter.data = value
