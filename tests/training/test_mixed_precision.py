from __future__ import annotations

import pytest
import torch
from torch import nn

from cache_pipeline.training.mixed_precision import WorkingCopies
from cache_pipeline.training.packing import Packed


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3))


def linears(model: nn.Sequential) -> list[nn.Linear]:
    return [layer for layer in model if isinstance(layer, nn.Linear)]


def copies_of(model: nn.Sequential) -> WorkingCopies:
    return WorkingCopies(linears(model), [Packed(dict(model.named_parameters()))], torch.bfloat16)


def autocast_loss(model: nn.Module, seed: int) -> torch.Tensor:
    x = torch.randn(8, 9, generator=torch.Generator().manual_seed(seed))
    with torch.autocast("cpu", torch.bfloat16):
        loss: torch.Tensor = model(x).float().square().mean()
        return loss


def run_out_of_memory(model: nn.Module) -> None:
    autocast_loss(model, 0).backward()
    raise torch.OutOfMemoryError("no room")


def gradients(model: nn.Module) -> list[torch.Tensor | None]:
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return found


def test_gradients_through_copies_are_those_of_autocast_to_the_bit(model: nn.Sequential) -> None:
    copies = copies_of(model)
    for step in range(2):
        for part in range(2):
            autocast_loss(model, 2 * step + part).backward()
        expected = gradients(model)
        with copies.applied():
            for part in range(2):
                autocast_loss(model, 2 * step + part).backward()
                copies.hand_over()
        for parameter in model.parameters():
            assert parameter.dtype == torch.float32
        for ours, theirs in zip(gradients(model), expected, strict=True):
            assert ours is not None
            assert theirs is not None
            assert ours.dtype == torch.float32
            assert torch.equal(ours, theirs)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)


def test_after_an_error_the_weights_are_back_and_nothing_of_the_step_is_left(model: nn.Sequential) -> None:
    before = list(model.parameters())
    copies = copies_of(model)
    with pytest.raises(torch.OutOfMemoryError), copies.applied():
        run_out_of_memory(model)
    assert all(now is then for now, then in zip(model.parameters(), before, strict=True))
    with copies.applied():
        copies.hand_over()
    assert gradients(model) == [None] * len(before)


def test_a_layer_that_takes_no_part_gets_no_gradient(model: nn.Sequential) -> None:
    copies = copies_of(model)
    with copies.applied():
        model[0](torch.ones(1, 9, dtype=torch.bfloat16)).sum().backward()
        copies.hand_over()
    assert [gradient is None for gradient in gradients(model)] == [False, False, True, True, True, True]
