"""The gradient of one batch, whatever it is cut into: parts that fit the memory, and shares of several processes."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cache_pipeline.errors import ConfigError
from cache_pipeline.policies.batch import Batch
from cache_pipeline.policies.draws import Share
from cache_pipeline.policies.visuomotor import VisuomotorPolicy
from cache_pipeline.training.distributed import Ranks
from cache_pipeline.training.mixed_precision import WorkingCopies

logger = logging.getLogger("cache_pipeline")


class Part(NamedTuple):
    """Windows ``start`` to ``stop`` of a batch."""

    batch: Batch
    start: int
    stop: int


class BatchGradient:
    """Leaves the gradient of a policy's loss in its parameters.

    The loss is a mean over the action steps that count, so parts weigh by how many of those they hold. Random numbers
    are drawn for the whole batch whatever part of it is at hand.

    Args:
        generator: of the loss's random numbers, in the same state in all processes.
        copies: of the weights, with which loss and gradient are computed.
        parts: into which a batch is cut; doubled for good whenever memory runs out.
        ranks: the processes that share each batch.
    """

    def __init__(
        self, policy: VisuomotorPolicy, generator: torch.Generator, copies: WorkingCopies, *, parts: int, ranks: Ranks
    ) -> None:
        self._policy, self._generator, self._copies, self._ranks = policy, generator, copies, ranks
        self.parts = parts

    def __call__(self, batch: Batch, parameters: Collection[nn.Parameter]) -> Tensor:
        """The loss of the whole batch, detached.

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

    def at_once(self, batch: Batch) -> Tensor:
        """The same for a batch that is neither cut nor shared, with nothing asked of the device; memory may run out."""
        with self._copies.applied():
            return self._add(Part(batch, 0, len(batch.actions)), len(batch.actions))

    def _tried(self, batch: Batch, kept: Tensor, state: Tensor) -> Tensor | None:
        """This process's part of the loss, its gradient added up; None if memory ran out."""
        losses = []
        try:
            with self._copies.applied():
                for part in cut(batch, self.parts):
                    self._generator.set_state(state)
                    losses.append(self._add(part, len(batch.actions), kept))
        except torch.OutOfMemoryError:
            return None
        return reduce(torch.add, losses)

    def _add(self, part: Part, size: int, kept: Tensor | None = None) -> Tensor:
        """Adds the gradient of a part of a batch of ``size`` windows; its share of the loss, detached.

        Args:
            kept: action steps that count in the whole batch, if the part is not all of it.
        """
        loss = self._policy.loss(part.batch, self._share(part, size))
        if kept is not None and (self.parts > 1 or self._ranks.world > 1):
            loss = loss * (part.batch.mask.sum() / kept)
        torch.autograd.backward(loss)
        self._copies.hand_over()
        return loss.detach()

    def _share(self, part: Part, size: int) -> Share:
        before = self._ranks.rank * size
        return Share(self._generator, before + part.start, before + part.stop, self._ranks.world * size)

    def _shrink(self, size: int, parameters: Collection[nn.Parameter]) -> None:
        if self.parts >= size:
            raise ConfigError(
                "one window alone does not fit the device's memory: unfreeze fewer layers, add "
                "--gradient-checkpointing, or take smaller frames (--resize-shape)"
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


def cut(batch: Batch, count: int) -> Iterator[Part]:
    """``count`` parts of a batch, as equal as can be; fewer if it has fewer windows."""
    size = len(batch.actions)
    if count == 1:
        yield Part(batch, 0, size)
        return
    length = -(-size // count)
    for start in range(0, size, length):
        stop = min(size, start + length)
        yield Part(batch.select(slice(start, stop)), start, stop)
