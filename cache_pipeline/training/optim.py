"""The optimiser's parameter groups, the learning-rate schedule, and the averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import compress
from typing import Literal

import torch
from torch import Tensor, nn

from cache_pipeline.errors import CheckpointError
from cache_pipeline.training.config import OptimConfig

Part = Literal["policy", "encoder"]
BETAS, EPS = (0.9, 0.999), 1e-8


class _Group:
    """Parameters of one peak learning rate and weight decay, and what AdamW keeps of each of them.

    Moments are in the memory format of their parameter, as the fused update needs them. The numbers of steps lie side
    by side, so that all count on at once.
    """

    def __init__(self, rate: float, decay: float, parameters: Mapping[str, nn.Parameter]) -> None:
        self.rate, self.decay = rate, decay
        self.names, self.parameters = list(parameters), list(parameters.values())
        self._exp_avgs = [torch.zeros_like(value, requires_grad=False) for value in self.parameters]
        self._exp_avg_sqs = [torch.zeros_like(value, requires_grad=False) for value in self.parameters]
        self._counter = torch.zeros(len(self.names), device=self.parameters[0].device)
        self._steps = list(self._counter.unbind())

    @property
    def state(self) -> dict[str, list[Tensor]]:
        """Moment → its tensors, in the order of ``names``."""
        return {"exp_avg": self._exp_avgs, "exp_avg_sq": self._exp_avg_sqs, "step": self._steps}

    @property
    def gradients(self) -> list[Tensor]:
        """Those that there are."""
        return [value.grad for value in self.parameters if value.grad is not None]

    def update(self, rate: float, scale: Tensor | None) -> None:
        """One update of the parameters that have a gradient; gradients are divided by ``scale``."""
        gradients = self.gradients
        if not gradients:
            return
        lists: list[list[Tensor]] = [[*self.parameters], self._exp_avgs, self._exp_avg_sqs, self._steps]
        if len(gradients) == len(self.parameters):
            self._counter.add_(1)
        else:
            live = [value.grad is not None for value in self.parameters]
            self._counter.add_(torch.tensor(live, device=self._counter.device))
            lists = [list(compress(values, live)) for values in lists]
        parameters, exp_avgs, exp_avg_sqs, steps = lists
        torch._fused_adamw_(
            parameters,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            lr=rate,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=self.decay,
            eps=EPS,
            amsgrad=False,
            maximize=False,
            grad_scale=scale,
        )


class Optimizer:
    """AdamW over named parameters, whose state is kept by parameter name so that groups may grow.

    The update is the operator under torch's AdamW; what is around it there is a twentieth of a small policy's step.

    Args:
        rates: peak learning rate of each part.
        steps: length of the schedule.
    """

    def __init__(self, config: OptimConfig, rates: Mapping[Part, float], steps: int) -> None:
        self._config, self._rates, self._steps = config, dict(rates), steps
        self._warmup = min(config.warmup_steps, steps // 10)
        self._groups: list[_Group] = []

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Name → parameter, of all that learn."""
        return {
            name: parameter
            for group in self._groups
            for name, parameter in zip(group.names, group.parameters, strict=True)
        }

    def add(self, part: Part, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Lets parameters learn from now on; those that learn already are left as they are."""
        known = set(self.parameters.values())
        fresh = [(name, parameter) for name, parameter in parameters if parameter not in known]
        for decayed in (True, False):
            chosen = {name: parameter for name, parameter in fresh if (parameter.dim() > 1) is decayed}
            if chosen:
                self._groups.append(_Group(self._rates[part], self._config.weight_decay if decayed else 0.0, chosen))

    @torch.no_grad()
    def step(self, number: int) -> None:
        """One update with the learning rate of step ``number``, counted from 0; gradients are clipped before."""
        share = schedule(number, self._steps, self._warmup, self._config.min_lr_ratio)
        scale = None if self._config.grad_clip is None else self._clip(self._config.grad_clip)
        for group in self._groups:
            group.update(group.rate * share, scale)
            for parameter in group.parameters:
                parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """``<moment>/<parameter name>`` → tensor."""
        return {
            f"{moment}/{name}": value
            for group in self._groups
            for moment, values in group.state.items()
            for name, value in zip(group.names, values, strict=True)
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what ``tensors`` gave, for the parameters that learn now; raises CheckpointError on a misfit."""
        for key, own in self.tensors().items():
            name = key.partition("/")[2]
            if f"step/{name}" not in tensors:
                continue
            if key not in tensors or tensors[key].shape != own.shape:
                raise CheckpointError(f"the optimiser's state for {name} does not fit; start a new run")
            own.copy_(tensors[key])

    def _clip(self, max_norm: float) -> Tensor | None:
        """Lets the gradients' norm together be at most ``max_norm``, as torch's ``clip_grad_norm_`` does.

        Returns:
            By what the fused update is to divide gradients as it reads them, which saves the pass that would write
            them. On a CPU the norm can be looked at for nothing, and small gradients need not be divided at all.
            Devices other than CPUs and CUDA's have them divided here.
        """
        gradients = [gradient for group in self._groups for gradient in group.gradients]
        if not gradients:
            return None
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if norm.device.type == "cpu" and bool(norm <= max_norm):
            return None
        scale = (norm / max_norm).clamp_(min=1.0)
        if norm.device.type in ("cpu", "cuda"):
            return scale
        torch._foreach_div_(gradients, scale)
        return None


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
