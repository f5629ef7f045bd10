"""Data parallelism under ``torchrun``: every process computes its share of each planned batch.

The loss curve is that of one process with the same batch size. All processes plan the same batches, draw the same
random numbers and hold the same weights. They differ in the windows that they compute; only the first one writes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from cache_pipeline.errors import CachePipelineError, ConfigError
from cache_pipeline.training.data.sampler import Plan

logger = logging.getLogger("cache_pipeline")

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# The others wait while the first process measures and saves.
PATIENCE = timedelta(hours=1)


class Ranks(NamedTuple):
    """One of ``world`` processes that train together; with one process, the default, exchanges cost nothing."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    def check(self, batch_size: int) -> None:
        """Raises ConfigError unless ``batch_size`` can be shared evenly."""
        if batch_size % self.world:
            nearest = max(1, round(batch_size / self.world)) * self.world
            raise ConfigError(
                f"batch_size {batch_size} cannot be shared by {self.world} processes; use --batch-size {nearest}"
            )

    def share(self, plan: Plan) -> Plan:
        """This process's windows of a planned batch."""
        if self.world == 1:
            return plan
        size = len(plan.windows) // self.world
        mine = slice(self.rank * size, (self.rank + 1) * size)
        return plan._replace(windows=plan.windows[mine], views=plan.views[mine])

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors of one dtype by their sums over all processes, in one exchange."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([value.reshape(-1) for value in tensors])
        with _others_may_end(self):
            dist.all_reduce(flat)
        parts = torch.split(flat, [value.numel() for value in tensors])
        for value, part in zip(tensors, parts, strict=True):
            value.copy_(part.view_as(value))

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process; exchanged on the CPU."""
        if self.world == 1:
            return flag
        value = torch.tensor(float(flag))
        self.sum([value])
        return bool(value > 0)

    def number_of_first(self, number: int) -> int:
        """The number that the first process gives; exchanged on the CPU."""
        value = torch.tensor(number)
        self.take_from_first([value])
        return int(value)

    def take_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Replaces tensors by those of the first process."""
        if self.world > 1:
            with _others_may_end(self):
                for value in tensors:
                    dist.broadcast(value, 0)

    def wait(self) -> None:
        """Returns when all processes have called it."""
        self.any(False)


ALONE = Ranks()


def launched() -> Ranks:
    """What ``torchrun`` started this process as, read from its environment."""
    if not all(name in os.environ for name in TORCHRUN):
        return ALONE
    return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def current_ranks() -> Ranks:
    """The group that this process has joined."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return ALONE


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """Joins the processes that ``torchrun`` started, for the time of a ``with`` block.

    CUDA processes take the device of their local rank unless ``device`` names another, and exchange over NCCL; others
    over Gloo. Only the first process logs more than warnings.

    Raises:
        ConfigError: more processes than CUDA devices.
        CachePipelineError: another process ended early; its own error says why.
    """
    ranks = launched()
    if ranks.world == 1:
        yield ranks
        return
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if cuda:
        _take_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    level = logger.level
    if not ranks.first:
        logger.setLevel(logging.WARNING)
    try:
        yield ranks
        ranks.wait()
    finally:
        logger.setLevel(level)
        dist.destroy_process_group()


def _take_device(device: str) -> None:
    local = int(os.environ["LOCAL_RANK"])
    if device in ("auto", "cuda"):
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local} has no CUDA device of its own, there are {torch.cuda.device_count()}; start no more "
                f"processes than devices with --nproc-per-node, or take --device cpu"
            )
        torch.cuda.set_device(local)


@contextmanager
def _others_may_end(ranks: Ranks) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise CachePipelineError(
            f"process {ranks.rank} of {ranks.world} stopped because another one did; the error of that one says why"
        ) from error
