from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cache_pipeline.errors import ConfigError
from cache_pipeline.policies.batch import Batch, masked_mean
from cache_pipeline.policies.draws import Draws, normal
from cache_pipeline.training.update.distributed import ALONE
from cache_pipeline.training.update.gradients import BatchGradient, parts_of


class Shifted(nn.Module):
    """Its loss draws one number for each window; memory runs out above ``room`` windows."""

    def __init__(self, room: int = 100) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.room = room
        self.precision, self.device = "fp32", torch.device("cpu")

    def loss(self, batch: Batch, generator: Draws = None) -> torch.Tensor:
        if len(batch.actions) > self.room:
            raise torch.OutOfMemoryError("no room")
        noise = normal((len(batch.actions), 1, 1), generator, batch.actions.device)
        return masked_mean((batch.actions * self.weight + noise).square(), batch.mask)


def batch() -> Batch:
    mask = torch.tensor([[1, 1], [1, 0], [1, 0], [0, 0], [1, 1]], dtype=torch.bool)
    return Batch({}, torch.randn(5, 2, 2, generator=torch.Generator().manual_seed(3)), mask)


def gradient(policy: Any, parts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    measured = BatchGradient(policy, generator, parts=parts, ranks=ALONE)
    loss = measured(batch(), [policy.weight])
    return loss, policy.weight.grad, generator.get_state()


@pytest.mark.parametrize("parts", [2, 3, 5, 9])
def test_a_batch_in_parts_has_the_loss_gradient_and_draws_of_the_whole(parts: int) -> None:
    for whole, cut_up in zip(gradient(Shifted(), 1), gradient(Shifted(), parts), strict=True):
        torch.testing.assert_close(cut_up, whole)


@pytest.mark.parametrize("room", [1, 2, 4])
def test_a_batch_that_does_not_fit_is_cut_until_it_does_with_the_same_gradient(
    room: int, caplog: pytest.LogCaptureFixture
) -> None:
    for whole, shrunk in zip(gradient(Shifted(), 1), gradient(Shifted(room), 1), strict=True):
        torch.testing.assert_close(shrunk, whole)
    assert "out of memory: from now on each batch is computed in 2 parts" in caplog.text


def test_a_window_that_does_not_fit_by_itself_is_refused() -> None:
    with pytest.raises(ConfigError, match="one window alone"):
        gradient(Shifted(0), 1)


def test_parts_cover_every_window_once() -> None:
    for count in range(1, 8):
        parts = parts_of(5, count)
        assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
        assert (parts[0].start, parts[-1].stop) == (0, 5)
        assert len(parts) <= count
