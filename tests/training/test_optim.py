import copy
import math

import pytest
import torch
from torch import nn

from cache_pipeline.training.config import OptimConfig
from cache_pipeline.training.optim import Optimizer


def stepped(model: nn.Module, max_norm: float | None) -> list[torch.Tensor]:
    """The parameters after one update of a copy of ``model``."""
    ours = copy.deepcopy(model)
    for theirs, own in zip(model.parameters(), ours.parameters(), strict=True):
        own.grad = None if theirs.grad is None else theirs.grad.clone()
    optimizer = Optimizer(OptimConfig(grad_clip=max_norm, warmup_steps=0), {"policy": 0.1}, 100)
    optimizer.add("policy", ours.named_parameters())
    optimizer.step(0)
    moments = [value for name, value in sorted(optimizer.tensors().items()) if not name.startswith("step")]
    return [*ours.parameters(), *moments]


def model_with_gradients() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    model[:2](torch.randn(5, 3)).square().sum().backward()
    return model


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e3])
def test_gradients_are_clipped_as_torch_does(max_norm: float) -> None:
    model = model_with_gradients()
    ours = stepped(model, max_norm)
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    assert model[2].weight.grad is None
    torch.testing.assert_close(ours, stepped(model, None), rtol=1e-5, atol=1e-12)


def test_a_small_gradient_after_a_large_one_is_not_scaled() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = Optimizer(OptimConfig(grad_clip=1.0, warmup_steps=0), {"policy": 0.1}, 100)
    optimizer.add("policy", [("w", parameter)])
    for size in (100.0, 0.1):
        parameter.grad = torch.full((3,), size)
        optimizer.step(0)
    moment = optimizer.tensors()["exp_avg/w"]
    torch.testing.assert_close(moment, torch.full((3,), 0.9 * 0.1 / math.sqrt(3) + 0.1 * 0.1))


def test_a_norm_that_is_not_finite_is_not_taken_for_a_small_one() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = Optimizer(OptimConfig(grad_clip=1.0), {"policy": 0.1}, 100)
    optimizer.add("policy", [("w", parameter)])
    parameter.grad = torch.tensor([1.0, float("nan")])
    optimizer.step(0)
    assert parameter.isnan().all()
