import copy

import pytest
import torch
from torch import nn

from cache_pipeline.training.optim import clip_gradients


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e3])
def test_gradients_are_clipped_as_torch_does(max_norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    model[:2](torch.randn(5, 3)).square().sum().backward()
    reference = copy.deepcopy(model)
    for theirs, ours in zip(reference.parameters(), model.parameters(), strict=True):
        theirs.grad = None if ours.grad is None else ours.grad.clone()
    nn.utils.clip_grad_norm_(reference.parameters(), max_norm)
    clip_gradients(model.parameters(), max_norm)
    assert model[2].weight.grad is None
    for theirs, ours in zip(reference.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=0)


def test_a_norm_that_is_not_finite_is_not_taken_for_a_small_one():
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, float("nan")])
    clip_gradients([parameter], 1.0)
    assert parameter.grad.isnan().all()
