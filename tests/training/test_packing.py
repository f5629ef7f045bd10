from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cache_pipeline.training.packing import Packed


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5 * 4 * 4, 7, bias=False))
    return model.to(memory_format=torch.channels_last)


def packed(model: nn.Module) -> Packed:
    return Packed(dict(model.named_parameters()))


def test_packing_changes_no_value_and_no_memory_format(model: nn.Sequential) -> None:
    before = copy.deepcopy(model)
    held = list(model.parameters())
    pack = packed(model)
    assert all(now is then for now, then in zip(model.parameters(), held, strict=True))
    for now, then in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(now, then)
        assert now.stride() == then.stride()
        assert now.data_ptr() % 64 == pack.values.data_ptr() % 64
    images = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(images), before(images))


def test_one_operator_reaches_all_parameters_and_loading_reaches_the_memory(model: nn.Sequential) -> None:
    pack, before = packed(model), copy.deepcopy(model)
    pack.values.mul_(2)
    for now, then in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(now, 2 * then)
    model.load_state_dict(before.state_dict())
    views = pack.views(pack.values)
    assert all(torch.equal(now, then) for now, then in zip(views, before.parameters(), strict=True))


def test_a_parameter_that_is_not_dense_is_packed_with_its_values() -> None:
    wide = torch.arange(12.0).view(3, 4)
    parameter = nn.Parameter(wide[:, ::2])
    pack = Packed({"w": parameter})
    assert parameter.tolist() == [[0, 2], [4, 6], [8, 10]]
    assert float(pack.values.sum()) == 30


def test_views_lie_apart_and_a_copy_of_the_model_has_memory_of_its_own(model: nn.Sequential) -> None:
    pack = packed(model)
    memory = pack.new(torch.bfloat16)
    for number, view in enumerate(pack.views(memory), 1):
        view.add_(number)
    assert memory.dtype == torch.bfloat16
    counts = {number: int((memory == number).sum()) for number in (1, 2, 3)}
    assert counts == {number: value.numel() for number, value in enumerate(pack.parameters, 1)}
    other = copy.deepcopy(model)
    other[0].weight.data.zero_()
    assert float(model[0].weight.detach().abs().sum()) > 0


def test_packed_parameters_go_through_a_file(model: nn.Sequential, tmp_path: Path) -> None:
    packed(model)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    for name, value in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(value, model.state_dict()[name])


def test_gradients_lie_together_only_if_all_were_brought_there(model: nn.Sequential) -> None:
    pack = packed(model)
    brought = [torch.randn(value.shape, generator=torch.Generator().manual_seed(3)) for value in pack.parameters]
    assert pack.whole_gradient is None
    for number, gradient in enumerate(brought):
        assert pack.whole_gradient is None
        pack.add_gradient(number, gradient.bfloat16())
    whole = pack.whole_gradient
    assert whole is not None
    pack.add_gradient(1, brought[1].bfloat16())
    expected = [brought[0].bfloat16().float(), 2 * brought[1].bfloat16().float(), brought[2].bfloat16().float()]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(pack.gradients, expected, strict=True))
    assert float(torch.linalg.vector_norm(whole)) == pytest.approx(
        float(torch.linalg.vector_norm(torch.cat([value.flatten() for value in expected])))
    )
    pack.drop_gradients()
    assert pack.whole_gradient is None
    assert pack.gradients == []
    for number in (0, 1):
        pack.add_gradient(number, brought[number])
    pack.parameters[2].grad = brought[2]
    assert pack.whole_gradient is None
    assert len(pack.gradients) == 3
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(pack.gradients, brought, strict=True))
