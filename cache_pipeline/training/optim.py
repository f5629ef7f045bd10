"""The optimiser's parameter groups, the learning-rate schedule, and the averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Literal

import torch
from torch import Tensor, nn

from cache_pipeline.errors import CheckpointError
from cache_pipeline.training.config import OptimConfig
from cache_pipeline.training.packing import Packed

Part = Literal["policy", "encoder"]
BETAS, EPS = (0.9, 0.999), 1e-8


class _Group:
    """Packed parameters of one peak learning rate and weight decay, and what AdamW keeps of each of them."""

    def __init__(self, rate: float, decay: float, packed: Packed) -> None:
        self.rate, self.decay, self.packed = rate, decay, packed
        self._exp_avg, self._exp_avg_sq = packed.new(), packed.new()
        self._counter = torch.zeros(len(packed.names), device=packed.values.device)
        self._steps = list(self._counter.unbind())
        self._state = {
            "exp_avg": packed.views(self._exp_avg),
            "exp_avg_sq": packed.views(self._exp_avg_sq),
            "step": self._steps,
        }
        self._in_step = True

    @property
    def memory(self) -> list[Tensor]:
        """All that an update changes."""
        return [self.packed.values, self._exp_avg, self._exp_avg_sq, self._counter]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """``<moment>/<parameter name>``, tensor."""
        for moment, values in self._state.items():
            yield from ((f"{moment}/{name}", value) for name, value in zip(self.packed.names, values, strict=True))

    def count_steps(self) -> None:
        """Has to follow any change of the numbers of steps from outside."""
        self._in_step = bool((self._counter == self._counter[0]).all())

    def update(self, rate: float | Tensor, scale: Tensor | None) -> None:
        """One update of the parameters that have a gradient; gradients are divided by ``scale``."""
        parameters, gradients, exp_avgs, exp_avg_sqs, steps = self._operands()
        if not parameters:
            return
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

    def _operands(self) -> tuple[list[Tensor], ...]:
        """Parameters, gradients, moments and numbers of steps, counted on: in one piece each where that can be."""
        packed, whole = self.packed, self.packed.whole_gradient
        if whole is not None and self._in_step:
            self._counter.add_(1)
            return [packed.values], [whole], [self._exp_avg], [self._exp_avg_sq], self._steps[:1]
        each: list[list[Tensor]] = [[*packed.parameters], *self._state.values()]
        live = [value.grad is not None for value in packed.parameters]
        if all(live):
            self._counter.add_(1)
        else:
            self._counter.add_(torch.tensor(live, device=self._counter.device))
            self._in_step &= not any(live)
            each = [list(compress(values, live)) for values in each]
        return each[0], packed.gradients, *each[1:]


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
            for packed in self.packs
            for name, parameter in zip(packed.names, packed.parameters, strict=True)
        }

    @property
    def packs(self) -> list[Packed]:
        """All that learn, in the memory in which they lie together."""
        return [group.packed for group in self._groups]

    def add(self, part: Part, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Lets parameters learn from now on; those that learn already are left as they are."""
        known = set(self.parameters.values())
        fresh = [(name, parameter) for name, parameter in parameters if parameter not in known]
        kinds: dict[tuple[bool, torch.dtype], dict[str, nn.Parameter]] = {}
        for name, parameter in fresh:
            kinds.setdefault((parameter.dim() > 1, parameter.dtype), {})[name] = parameter
        for (decayed, _), chosen in kinds.items():
            decay = self._config.weight_decay if decayed else 0.0
            self._groups.append(_Group(self._rates[part], decay, Packed(chosen)))

    @property
    def memory(self) -> list[Tensor]:
        """All that an update changes, weights among it."""
        return [value for group in self._groups for value in group.memory]

    def share(self, number: int) -> float:
        """Of the peak learning rate, at step ``number``, counted from 0."""
        return schedule(number, self._steps, self._warmup, self._config.min_lr_ratio)

    @torch.no_grad()
    def step(self, share: float | Tensor) -> None:
        """One update with ``share`` of the peak learning rate; gradients are clipped before, and dropped after."""
        scale = None if self._config.grad_clip is None else self._clip(self._config.grad_clip)
        for group in self._groups:
            group.update(group.rate * share, scale)
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Leaves no parameter a gradient."""
        for packed in self.packs:
            packed.drop_gradients()

    def tensors(self) -> dict[str, Tensor]:
        """``<moment>/<parameter name>`` → tensor."""
        return {key: value for group in self._groups for key, value in group.tensors()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what ``tensors`` gave, for the parameters that learn now; raises CheckpointError on a misfit."""
        for key, own in self.tensors().items():
            name = key.partition("/")[2]
            if f"step/{name}" not in tensors:
                continue
            if key not in tensors or tensors[key].shape != own.shape:
                raise CheckpointError(f"the optimiser's state for {name} does not fit; start a new run")
            own.copy_(tensors[key])
        for group in self._groups:
            group.count_steps()

    def _clip(self, max_norm: float) -> Tensor | None:
        """Lets the gradients' norm together be at most ``max_norm``, as torch's ``clip_grad_norm_`` does.

        Returns:
            By what the fused update is to divide gradients as it reads them, which saves the pass that would write
            them. On a CPU the norm can be looked at for nothing, and small gradients need not be divided at all.
            Devices other than CPUs and CUDA's have them divided here.
        """
        gradients = [gradient for packed in self.packs for gradient in _gradients(packed)]
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


def _gradients(packed: Packed) -> list[Tensor]:
    """All that there are, in one tensor if they lie in one."""
    whole = packed.whole_gradient
    return packed.gradients if whole is None else [whole]


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
        self._packs: list[Packed] = []
        self._averages: list[Tensor] = []

    def add(self, packs: Iterable[Packed]) -> None:
        """Starts the average of parameters that are new at their values now."""
        for packed in packs:
            if packed not in self._packs:
                self._packs.append(packed)
                self._averages.append(packed.values.clone())

    @property
    def memory(self) -> list[Tensor]:
        """All that an update changes."""
        return self._averages

    def weight(self, number: int) -> float:
        """Of the weights after step ``number``, counted from 0, in their average."""
        return 1 - min(self._decay, (1 + number) / (10 + number))

    @torch.no_grad()
    def update(self, weight: float | Tensor) -> None:
        """Moves towards the weights as they are now, which get ``weight`` in the average."""
        for average, packed in zip(self._averages, self._packs, strict=True):
            average.lerp_(packed.values, weight)

    def tensors(self) -> dict[str, Tensor]:
        """Parameter name → its average."""
        return {
            name: view
            for packed, average in zip(self._packs, self._averages, strict=True)
            for name, view in zip(packed.names, packed.views(average), strict=True)
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what ``tensors`` gave; raises CheckpointError on a misfit."""
        for name, value in self.tensors().items():
            if name not in tensors or tensors[name].shape != value.shape:
                raise CheckpointError(f"the averaged weights have no fitting {name}; start a new run")
            value.copy_(tensors[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Puts the average in the parameters' place for the time of a ``with`` block."""
        try:
            self._point_to(self._averages)
            yield
        finally:
            self._point_to([packed.values for packed in self._packs])

    def _point_to(self, memory: Sequence[Tensor]) -> None:
        for packed, values in zip(self._packs, memory, strict=True):
            for parameter, view in zip(packed.parameters, packed.views(values), strict=True):
                parameter.data = view
