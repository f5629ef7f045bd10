"""Trains flow, mlp and gmm: the policy with its optimiser, its averaged weights and its random numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from cache_pipeline.encoders.precision import computing_in
from cache_pipeline.errors import CheckpointError
from cache_pipeline.policies.batch import Batch
from cache_pipeline.policies.visuomotor import VisuomotorPolicy
from cache_pipeline.runs.checkpoint import State
from cache_pipeline.training.config import OptimConfig
from cache_pipeline.training.update.distributed import current_ranks
from cache_pipeline.training.update.gradients import BatchGradient
from cache_pipeline.training.update.optimizer import AveragedWeights, Component, Optimizer

GENERATOR = "generator"


class PolicyLearner:
    """Trains a VisuomotorPolicy by its own loss.

    Args:
        policy: the policy to train, with its precision set.
        rates: peak learning rate of each component.
        steps: length of the schedule.
        seed: of the noise in the loss.
        accumulate: number of parts of a batch; it grows when memory runs out.
    """

    def __init__(
        self,
        policy: VisuomotorPolicy,
        optim: OptimConfig,
        *,
        rates: Mapping[Component, float],
        steps: int,
        seed: int,
        device: torch.device,
        accumulate: int = 1,
    ) -> None:
        self._policy, self._device = policy, device
        self._optimizer = Optimizer(optim, rates, steps, device=device, precision=policy.precision)
        self._average = None if optim.ema is None else AveragedWeights(optim.ema)
        self._generator = torch.Generator(device).manual_seed(seed)
        self._gradient = BatchGradient(
            policy, self._generator, parts=accumulate, ranks=current_ranks(), scaled=self._optimizer.scaled
        )
        self.learn("policy", policy.policy_parameters())

    def learn(self, component: Component, parameters: Iterable[tuple[str, nn.Parameter]], start: int = 0) -> None:
        """Trains parameters from step ``start`` on, with the learning rate of ``component``."""
        parameters = list(parameters)
        for _, parameter in parameters:
            parameter.requires_grad_(True)
        self._optimizer.add(component, parameters, start)
        if self._average is not None:
            self._average.add(self._optimizer.parameters)

    def step(self, batch: Batch, number: int) -> Tensor:
        """Makes update ``number``, counted from 0; returns the loss as a scalar on the device, detached."""
        with computing_in(self._policy.precision, self._device):
            loss = self._gradient(batch, self._optimizer.parameters.values())
        self._optimizer.step(number)
        if self._average is not None:
            self._average.update(number)
        return loss

    def rates(self) -> dict[str, float]:
        """Returns column of metrics.csv → the learning rate of the last update."""
        names = {"policy": "training/lr", "encoder": "training/encoder_lr"}
        return {names[component]: rate for component, rate in self._optimizer.current_rates().items()}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the policy has the averaged weights, with which it acts after training."""
        with self._average.applied() if self._average is not None else nullcontext():
            yield

    def state(self) -> State:
        """Returns the tensors of a checkpoint; they change with further steps."""
        average = {} if self._average is None else self._average.tensors()
        return State(
            self._policy.tensors(), average, {**self._optimizer.tensors(), GENERATOR: self._generator.get_state()}
        )

    def load(self, state: State) -> None:
        """Loads the value of ``state``; raises CheckpointError if it does not fit."""
        self._policy.load_tensors(state.model)
        if self._average is not None:
            self._average.load(state.ema)
        self._optimizer.load(state.resume)
        saved = state.resume.get(GENERATOR)
        if saved is None or saved.dtype != torch.uint8 or saved.shape != self._generator.get_state().shape:
            raise CheckpointError("the checkpoint's random state is not of this device or version; start a new run")
        self._generator.set_state(saved.cpu())
