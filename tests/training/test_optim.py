import copy
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cache_pipeline.errors import CheckpointError
from cache_pipeline.training.config import OptimConfig
from cache_pipeline.training.update.optimizer import AveragedWeights, Component, Optimizer, schedule

RATES: dict[Component, float] = {"policy": 0.1, "encoder": 0.01}


def stepped(model: nn.Module, max_norm: float | None) -> list[torch.Tensor]:
    """The parameters after one update of a copy of ``model``."""
    ours = copy.deepcopy(model)
    for theirs, own in zip(model.parameters(), ours.parameters(), strict=True):
        own.grad = None if theirs.grad is None else theirs.grad.clone()
    optimizer = Optimizer(OptimConfig(grad_clip=max_norm, warmup_steps=0), {"policy": 0.1}, 100)
    optimizer.add("policy", ours.named_parameters())
    optimizer.step(0)
    moments = [value for name, value in sorted(optimizer.tensors().items()) if name.startswith("exp_avg")]
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


def test_updates_and_state_are_those_of_torch() -> None:
    """Over five steps, with two rates, decay of matrices alone, and a layer that has a gradient in some steps only."""
    torch.manual_seed(0)
    ours = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
    theirs = copy.deepcopy(ours)
    optimizer = Optimizer(OptimConfig(grad_clip=None, warmup_steps=0, weight_decay=0.3), RATES, 100)
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in layers.parameters() if (p.dim() > 1) is decayed], "lr": rate, "weight_decay": decay}
            for layers, rate in ((theirs[:2], RATES["policy"]), (theirs[2:], RATES["encoder"]))
            for decayed, decay in ((True, 0.3), (False, 0.0))
        ],
        foreach=False,
    )
    peaks = [group["lr"] for group in reference.param_groups]
    optimizer.add("policy", ours[:2].named_parameters("0"))
    optimizer.add("encoder", ours[2:].named_parameters("1"))
    for number in range(5):
        drawn = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
        for layers in (ours, theirs):
            used = layers if number % 2 else [layers[0], layers[2]]
            sum(layer(drawn).square().mean() for layer in used).backward()
        for group, peak in zip(reference.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule(number, 100, 0, OptimConfig().min_lr_ratio)
        optimizer.step(number)
        reference.step()
        reference.zero_grad()
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=1e-5, atol=1e-7)
    steps = {name: float(value) for name, value in optimizer.tensors().items() if name.startswith("step/")}
    assert steps == {
        f"step/{name}": 2.0 if name.startswith("0.1.") else 5.0
        for name in ("0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias", "1.0.weight", "1.0.bias")
    }


def test_state_goes_through_a_file_by_name(tmp_path: Path) -> None:
    model = model_with_gradients()
    optimizer = Optimizer(OptimConfig(), {"policy": 0.1}, 100)
    optimizer.add("policy", model.named_parameters())
    optimizer.step(0)
    saved = {name: value.clone() for name, value in optimizer.tensors().items()}
    save_file(optimizer.tensors(), tmp_path / "state.safetensors")
    other = Optimizer(OptimConfig(), {"policy": 0.1}, 100)
    other.add("policy", copy.deepcopy(model).named_parameters())
    other.load(load_file(tmp_path / "state.safetensors"))
    assert other.tensors().keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in other.tensors().items())
    for resumed in (optimizer, other):
        for value in resumed.parameters.values():
            value.grad = torch.ones_like(value)
    for resumed in (optimizer, other):
        resumed.step(1)
    assert all(torch.equal(value, optimizer.parameters[name]) for name, value in other.parameters.items())
    with pytest.raises(CheckpointError, match=r"0\.weight does not fit"):
        other.load({**saved, "exp_avg/0.weight": torch.zeros(2, 2)})


def two_layers() -> tuple[nn.Sequential, dict[str, nn.Parameter]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    return model, dict(model.named_parameters())


def test_the_average_starts_at_the_weights_and_follows_them() -> None:
    model, named = two_layers()
    average = AveragedWeights(0.5)
    average.add({name: value for name, value in named.items() if name.startswith("0.")})
    expected = {name: value.detach().clone() for name, value in model.named_parameters()}
    for number in range(8):
        with torch.no_grad():
            for value in model.parameters():
                value.add_(1 + number)
        if number == 3:
            average.add(named)
            expected |= {name: value.detach().clone() for name, value in model[1].named_parameters("1")}
        average.update(number)
        decay = min(0.5, (1 + number) / (10 + number))
        for name, value in model.named_parameters():
            if number >= 3 or name.startswith("0."):
                expected[name] = decay * expected[name] + (1 - decay) * value.detach()
    assert average.tensors().keys() == expected.keys()
    for name, value in average.tensors().items():
        torch.testing.assert_close(value, expected[name])


def test_the_average_takes_the_weights_place_for_a_while_and_leaves_it_after_an_error() -> None:
    model, named = two_layers()
    average = AveragedWeights(0.5)
    average.add(named)
    average.load({name: torch.full_like(value, 7.0) for name, value in average.tensors().items()})
    held = list(model.parameters())
    before = [value.detach().clone() for value in held]
    with average.applied():
        assert all(now is then for now, then in zip(model.parameters(), held, strict=True))
        assert all(bool((value == 7).all()) for value in model.parameters())
    with pytest.raises(RuntimeError), average.applied():
        torch.zeros(2) @ torch.zeros(3)
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))
    with pytest.raises(CheckpointError, match=r"no fitting 1\.bias"):
        average.load({name: value for name, value in average.tensors().items() if name != "1.bias"})


class FakeScaler:
    """GradScaler's bookkeeping without a GPU: what it is asked, in order."""

    def __init__(self, device: str, enabled: bool) -> None:
        self.enabled, self.calls, self.state = enabled, [], {"scale": 65536.0, "_growth_tracker": 3}

    def is_enabled(self) -> bool:
        return self.enabled

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self.state["scale"]

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        self.calls.append("unscale")
        for group in optimizer.param_groups:
            for value in group["params"]:
                value.grad.div_(self.state["scale"])

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.calls.append("step")
        optimizer.step()

    def update(self) -> None:
        self.calls.append("update")

    def state_dict(self) -> dict[str, float]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.state = state


def test_float16_scales_the_loss_and_unscales_before_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.amp, "GradScaler", FakeScaler)
    made = [Optimizer(OptimConfig(warmup_steps=0), {"policy": 0.1}, 100, precision=p) for p in ("fp16", "fp32")]
    models = [copy.deepcopy(nn.Linear(3, 2)) for _ in made]
    models[1].load_state_dict(models[0].state_dict())
    for optimizer, model in zip(made, models, strict=True):
        optimizer._scaler.state["scale"] = 65536.0 if optimizer._scaler.is_enabled() else 1.0
        optimizer.add("policy", model.named_parameters())
        optimizer.scaled(model(torch.ones(1, 3)).square().sum()).backward()
        optimizer.step(0)
    assert [optimizer._scaler.is_enabled() for optimizer in made] == [True, False]
    assert made[0]._scaler.calls == ["unscale", "step", "update"]
    torch.testing.assert_close(list(models[0].parameters()), list(models[1].parameters()))
    saved = made[0].tensors()
    other = Optimizer(OptimConfig(), {"policy": 0.1}, 100, precision="fp16")
    other.add("policy", models[0].named_parameters())
    other._scaler.state = {"scale": 1.0, "_growth_tracker": 0}
    other.load(saved)
    assert other._scaler.state == {"scale": 65536.0, "_growth_tracker": 3}


def test_the_peak_rates_of_a_checkpoint_hold_and_an_earlier_versions_state_is_refused() -> None:
    model = model_with_gradients()
    optimizer = Optimizer(OptimConfig(), RATES, 100)
    optimizer.add("policy", model.named_parameters())
    optimizer.step(0)
    saved = optimizer.tensors()
    other = Optimizer(OptimConfig(), {"policy": 0.5, "encoder": 0.5}, 100)
    other.add("policy", copy.deepcopy(model).named_parameters())
    other.load(saved)
    assert {name: float(value) for name, value in other.tensors().items() if name.startswith("peak_rate/")} == {
        "peak_rate/policy": 0.1,
        "peak_rate/encoder": 0.01,
    }
    with pytest.raises(CheckpointError, match="of an earlier version and cannot be resumed; start a new run"):
        other.load({name: value for name, value in saved.items() if not name.startswith("peak_rate/")})


def test_parameters_that_begin_late_are_warmed_up_from_their_first_step() -> None:
    early, late = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = Optimizer(OptimConfig(warmup_steps=4, weight_decay=0), {"policy": 0.1, "encoder": 0.1}, 1000)
    optimizer.add("policy", [("early", early)])
    optimizer.add("encoder", [("late", late)], 100)
    moved = []
    for number in range(100, 105):
        before = early.item(), late.item()
        early.grad, late.grad = torch.ones(1), torch.ones(1)
        optimizer.step(number)
        moved.append((late.item() - before[1]) / (early.item() - before[0]))
    assert moved == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0], rel=1e-3)
