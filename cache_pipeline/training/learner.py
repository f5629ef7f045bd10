"""What the loop trains: anything that takes a batch, makes one update and can be saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cache_pipeline.errors import CheckpointError
from cache_pipeline.policies.batch import Batch
from cache_pipeline.policies.visuomotor import VisuomotorPolicy
from cache_pipeline.training.config import OptimConfig
from cache_pipeline.training.cuda_graph import GraphedUpdate, Number, Recorder
from cache_pipeline.training.distributed import current_ranks
from cache_pipeline.training.gradients import BatchGradient
from cache_pipeline.training.mixed_precision import working_copies
from cache_pipeline.training.optim import AveragedWeights, Optimizer, Part

GENERATOR = "generator"


class ActingPolicy(Protocol):
    """What can be measured and rolled out."""

    def act(self, obs: dict[str, Tensor], generator: torch.Generator | None = None) -> Tensor: ...

    def eval(self) -> Any: ...

    def train(self) -> Any: ...


class Learner(Protocol):
    """One trainable policy with its optimiser."""

    def step(self, batch: Batch, number: int) -> Tensor:
        """Makes update ``number``, counted from 0; the loss as a scalar on the device, detached."""
        ...

    def averaged(self) -> Any:
        """A context in which ``policy`` acts with the weights that rollouts will use."""
        ...

    @property
    def policy(self) -> ActingPolicy: ...

    def model_tensors(self) -> dict[str, Tensor]:
        """What ``model.safetensors`` holds."""
        ...

    def ema_tensors(self) -> dict[str, Tensor]:
        """What ``ema.safetensors`` holds; empty without averaged weights."""
        ...

    def resume_tensors(self) -> dict[str, Tensor]:
        """Optimiser and random state."""
        ...

    def load(self, model: Mapping[str, Tensor], ema: Mapping[str, Tensor], resume: Mapping[str, Tensor]) -> None:
        """Takes what the three above gave."""
        ...


class PolicyLearner:
    """Trains a VisuomotorPolicy by its own loss.

    Args:
        policy: its precision is that of now.
        rates: peak learning rate of each part.
        steps: length of the schedule.
        seed: of the noise in the loss.
        accumulate: parts into which a batch is cut, more when memory runs out.
        recorder: from the source of random numbers, what records updates so that they can be replayed; none by default.
    """

    def __init__(
        self,
        policy: VisuomotorPolicy,
        optim: OptimConfig,
        *,
        rates: Mapping[Part, float],
        steps: int,
        seed: int,
        device: torch.device,
        accumulate: int = 1,
        recorder: Callable[[torch.Generator], Recorder] | None = None,
    ) -> None:
        self._policy = policy
        self._optimizer = Optimizer(optim, rates, steps)
        self._average = None if optim.ema is None else AveragedWeights(optim.ema)
        self._generator = torch.Generator(device).manual_seed(seed)
        ranks = current_ranks()
        self._recorder = recorder if accumulate == 1 and ranks.world == 1 else None
        self.learn("policy", policy.policy_parameters())
        copies = working_copies(policy, self._optimizer.packs)
        self._gradient = BatchGradient(policy, self._generator, copies, parts=accumulate, ranks=ranks)

    @property
    def policy(self) -> VisuomotorPolicy:
        return self._policy

    @property
    def generator(self) -> torch.Generator:
        """The source of the loss's noise."""
        return self._generator

    def learn(self, part: Part, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Lets parameters learn from now on, with the learning rate of ``part``."""
        parameters = list(parameters)
        for _, parameter in parameters:
            parameter.requires_grad_(True)
        self._optimizer.add(part, parameters)
        if self._average is not None:
            self._average.add(self._optimizer.packs)
        self._graphed = self._to_be_recorded()

    def step(self, batch: Batch, number: int) -> Tensor:
        weight = 0.0 if self._average is None else self._average.weight(number)
        numbers = (self._optimizer.share(number), weight)
        return self._update(batch, numbers) if self._graphed is None else self._graphed(batch, numbers)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        with self._average.applied() if self._average is not None else nullcontext():
            yield

    def model_tensors(self) -> dict[str, Tensor]:
        return self._policy.tensors()

    def ema_tensors(self) -> dict[str, Tensor]:
        return {} if self._average is None else self._average.tensors()

    def resume_tensors(self) -> dict[str, Tensor]:
        return {**self._optimizer.tensors(), GENERATOR: self._generator.get_state()}

    def load(self, model: Mapping[str, Tensor], ema: Mapping[str, Tensor], resume: Mapping[str, Tensor]) -> None:
        self._policy.load_tensors(model)
        if self._average is not None:
            self._average.load(ema)
        self._optimizer.load(resume)
        state = resume.get(GENERATOR)
        if state is None or state.dtype != torch.uint8 or state.shape != self._generator.get_state().shape:
            raise CheckpointError("the checkpoint's random state is not of this device or version; start a new run")
        self._generator.set_state(state.cpu())

    def _update(self, batch: Batch, numbers: Sequence[Number]) -> Tensor:
        """One update with a share of the peak learning rate and a weight in the average; the loss, detached."""
        loss = self._gradient(batch, self._optimizer.parameters.values())
        self._apply(numbers)
        return loss

    def _update_at_once(self, batch: Batch, numbers: Sequence[Number]) -> Tensor:
        try:
            loss = self._gradient.at_once(batch)
            self._apply(numbers)
        finally:
            self._optimizer.drop_gradients()
        return loss

    def _apply(self, numbers: Sequence[Number]) -> None:
        share, weight = numbers
        self._optimizer.step(share)
        if self._average is not None:
            self._average.update(weight)

    def _to_be_recorded(self) -> GraphedUpdate | None:
        """For the parameters that learn now."""
        if self._recorder is None:
            return None
        recorder = self._recorder(self._generator)
        return GraphedUpdate(self._update, self._update_at_once, self._changed, self._generator, recorder)

    def _changed(self) -> list[Tensor]:
        return [*self._optimizer.memory, *(() if self._average is None else self._average.memory)]
