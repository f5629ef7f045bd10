"""Computes the gradient of one batch, split into parts that fit memory and into shares of several processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import reduce

import torch
from torch import Tensor, nn

from cache_pipeline.errors import ConfigError
from cache_pipeline.policies.batch import Batch
from cache_pipeline.policies.draws import Share
from cache_pipeline.policies.visuomotor import VisuomotorPolicy
from cache_pipeline.training.update.distributed import Ranks

logger = logging.getLogger("cache_pipeline")


class BatchGradient:
    """Computes the gradient of a policy's loss into its parameters.

    The loss is a mean over unmasked action steps, so parts are weighted by their number of unmasked steps. Random
    numbers are drawn for the whole batch, independent of the split.

    Args:
        generator: of the loss's random numbers, in the same state in all processes.
        parts: number of parts of a batch; doubled for the rest of the run whenever memory runs out.
        ranks: the processes that share each batch.
        scaled: the loss to what its gradient is taken of; see ``Optimizer.scaled``.
    """

    def __init__(
        self,
        policy: VisuomotorPolicy,
        generator: torch.Generator,
        *,
        parts: int,
        ranks: Ranks,
        scaled: Callable[[Tensor], Tensor] = lambda loss: loss,
    ) -> None:
        self._policy, self._generator, self._ranks, self._scaled = policy, generator, ranks, scaled
        self._weights = LowPrecisionWeights(policy) if uses_copies(policy) else None
        self.parts = parts

    def __call__(self, batch: Batch, parameters: Collection[nn.Parameter]) -> Tensor:
        """Computes the loss and gradient of the whole batch; returns the loss, detached.

        Args:
            batch: this process's share.
            parameters: those that learn.

        Raises:
            ConfigError: a single window does not fit the device.
        """
        state = self._generator.get_state()
        kept = batch.mask.sum(dtype=torch.float32)
        self._ranks.sum([kept])
        while (loss := self._tried(batch, kept.clamp_min_(1), state)) is None:
            self._shrink(len(batch.actions), parameters)
        if self._ranks.world > 1:
            self._ranks.sum([loss, *(p.grad for p in parameters if p.grad is not None)])
        return loss

    def _tried(self, batch: Batch, kept: Tensor, state: Tensor) -> Tensor | None:
        """Accumulates the gradient of this process's share; returns its part of the loss, or None if memory ran out."""
        losses = []
        try:
            with nullcontext() if self._weights is None else self._weights.applied():
                for part in parts_of(len(batch.actions), self.parts):
                    self._generator.set_state(state)
                    losses.append(self._add(batch, part, kept))
        except torch.OutOfMemoryError:
            return None
        return reduce(torch.add, losses)

    def _add(self, batch: Batch, part: slice, kept: Tensor) -> Tensor:
        """Adds the gradient of a part of this process's share; returns its part of the loss, detached.

        Args:
            kept: number of unmasked action steps in the whole batch.
        """
        size, windows = len(batch.actions), batch.select(part)
        before = self._ranks.rank * size
        draws = Share(self._generator, before + part.start, before + part.stop, self._ranks.world * size)
        loss = self._policy.loss(windows, draws)
        if self.parts > 1 or self._ranks.world > 1:
            loss = loss * (windows.mask.sum() / kept)
        torch.autograd.backward(self._scaled(loss))
        if self._weights is not None:
            self._weights.hand_over()
        return loss.detach()

    def _shrink(self, size: int, parameters: Collection[nn.Parameter]) -> None:
        if self.parts >= size:
            raise ConfigError(
                "one window alone does not fit the device's memory; unfreeze fewer layers, add "
                "--gradient-checkpointing, or use smaller frames (--resize-shape)"
            )
        self.parts = min(size, 2 * self.parts)
        for parameter in parameters:
            parameter.grad = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning(
            "out of memory: from now on each batch is computed in %d parts, with the same result; --accumulate %d does "
            "so from the start",
            self.parts,
            self.parts,
        )


def uses_copies(policy: VisuomotorPolicy) -> bool:
    """Whether a step computes with ``LowPrecisionWeights``: in bfloat16 on a CPU."""
    return policy.precision == "bf16" and policy.device.type == "cpu"


class LowPrecisionWeights:
    """Copies in bfloat16 of the weights of projection and action head, made at once for one forward and backward pass.

    ``torch.autocast`` makes the same casts with the same results, one by one and as part of the backward pass, which
    on a CPU is a fifth of a step on cached features. After Micikevicius et al., Mixed Precision Training, 2018
    (arXiv:1710.03740).
    """

    def __init__(self, policy: VisuomotorPolicy) -> None:
        named = dict(policy.policy_parameters())
        self._places = [(policy.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in named]
        self._weights = list(named.values())
        self._copies = [nn.Parameter(weight.detach().bfloat16()) for weight in self._weights]
        self._gradients = [torch.empty_like(weight) for weight in self._weights]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, layers hold fresh copies without gradients."""
        with torch.no_grad():
            torch._foreach_copy_(self._copies, self._weights)  # type: ignore[arg-type]
        for copy in self._copies:
            copy.grad = None
        self._place(self._copies)
        try:
            yield
        finally:
            self._place(self._weights)

    def hand_over(self) -> None:
        """Adds the copies' gradients to those of the weights, in float32."""
        for weight, copy, gradient in zip(self._weights, self._copies, self._gradients, strict=True):
            if copy.grad is None:
                continue
            if weight.grad is None:
                weight.grad = gradient.copy_(copy.grad)
            else:
                weight.grad.add_(copy.grad)
            copy.grad = None

    def _place(self, parameters: Sequence[nn.Parameter]) -> None:
        for (layer, name), parameter in zip(self._places, parameters, strict=True):
            setattr(layer, name, parameter)


def parts_of(size: int, count: int) -> list[slice]:
    """Divides ``size`` windows into ``count`` parts, as equal as can be; fewer parts if there are fewer windows."""
    length = -(-size // count)
    return [slice(start, min(size, start + length)) for start in range(0, size, length)]
