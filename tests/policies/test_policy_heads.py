from __future__ import annotations

import pytest
import torch

from cache_pipeline.errors import ConfigError
from cache_pipeline.policies.batch import masked_mean
from cache_pipeline.policies.flow import FlowConfig, FlowPolicy
from cache_pipeline.policies.gmm import GMMConfig, GMMPolicy
from cache_pipeline.policies.mlp import MLPConfig, MLPPolicy

COND, HORIZON, ACTIONS = 6, 4, 3
HIDDEN = (64, 64)


def heads() -> dict[str, torch.nn.Module]:
    return {
        "flow": FlowPolicy(COND, HORIZON, ACTIONS, FlowConfig(hidden=HIDDEN)),
        "mlp": MLPPolicy(COND, HORIZON, ACTIONS, MLPConfig(hidden=HIDDEN)),
        "gmm": GMMPolicy(COND, HORIZON, ACTIONS, GMMConfig(hidden=HIDDEN)),
    }


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(size: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Actions are a fixed linear function of the condition, within ±1."""
    cond = torch.randn(size, COND, generator=generator(1))
    weight = torch.randn(COND, HORIZON * ACTIONS, generator=generator(2))
    actions = torch.tanh(cond @ weight / 2).view(size, HORIZON, ACTIONS)
    return cond, actions, torch.ones(size, HORIZON, dtype=torch.bool)


@pytest.mark.parametrize("name", ["mlp", "gmm"])
def test_padded_action_steps_change_neither_loss_nor_gradient(name: str) -> None:
    head = heads()[name]
    cond, actions, mask = batch(8)
    mask[:, 2:] = False
    results = []
    for value in (0.0, 100.0):
        padded = actions.clone()
        padded[:, 2:] = value
        head.zero_grad()
        loss = head.loss(cond, padded, mask, generator())
        loss.backward()
        results.append((loss.detach(), next(head.parameters()).grad.clone()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_the_flow_is_not_trained_on_the_velocity_of_padded_action_steps() -> None:
    head = heads()["flow"]
    cond, actions, mask = batch(8)
    mask[:, 2:] = False
    head.loss(cond, actions, mask, generator()).backward()
    gradient = head.velocity[-1].bias.grad.view(HORIZON, ACTIONS)
    assert (gradient[:2] != 0).all()
    assert (gradient[2:] == 0).all()


@pytest.mark.parametrize("name", ["flow", "mlp", "gmm"])
def test_each_head_learns_a_deterministic_map_far_below_the_error_of_the_mean(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = heads()[name]
    cond, actions, mask = batch()
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    noise = generator()
    for _ in range(300):
        loss = head.loss(cond, actions, mask, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        error = (head.act(cond, generator(5)) - actions).square().mean()
    assert error < 0.25 * actions.var()


@pytest.mark.parametrize("name", ["flow", "gmm"])
def test_sampled_actions_depend_on_the_generator_alone(name: str) -> None:
    head, cond = heads()[name], batch(5)[0]
    first, again, other = (head.act(cond, generator(seed)) for seed in (3, 3, 4))
    assert first.shape == (5, HORIZON, ACTIONS)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_flow_integrates_a_straight_velocity_field_exactly() -> None:
    policy = FlowPolicy(COND, HORIZON, ACTIONS, FlowConfig(hidden=(8,), flow_steps=7))
    target = torch.full((2, HORIZON, ACTIONS), 0.5)
    start = torch.randn(2, HORIZON, ACTIONS, generator=generator(9))
    policy._velocity = lambda cond, chunk, time: target - start  # type: ignore[method-assign]
    torch.testing.assert_close(policy.act(torch.zeros(2, COND), generator(9)), target, atol=1e-6, rtol=0)


def test_a_gmm_of_one_mode_and_one_step_has_the_likelihood_of_a_normal_distribution() -> None:
    policy = GMMPolicy(COND, 1, ACTIONS, GMMConfig(hidden=(8,), modes=1))
    cond, actions = torch.randn(5, COND, generator=generator()), torch.randn(5, 1, ACTIONS, generator=generator(1))
    _, means, scales = policy._mixture(cond)
    expected = -torch.distributions.Normal(means[:, 0], scales[:, 0]).log_prob(actions).sum((1, 2)).mean()
    torch.testing.assert_close(policy.loss(cond, actions, torch.ones(5, 1, dtype=torch.bool)), expected)


def test_the_masked_mean_averages_only_unmasked_steps() -> None:
    values = torch.tensor([[[1.0, 3.0], [100.0, 100.0]]])
    assert masked_mean(values, torch.tensor([[True, False]])) == 2.0


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (FlowConfig, {"hidden": ()}),
        (FlowConfig, {"flow_steps": 0}),
        (FlowConfig, {"time_features": 3}),
        (MLPConfig, {"loss": "huber"}),
        (GMMConfig, {"modes": 0}),
        (GMMConfig, {"min_std": 0.0}),
    ],
)
def test_options_out_of_range_are_refused(config: type, options: dict) -> None:
    with pytest.raises(ConfigError):
        config(**options)


def test_the_flow_starts_from_the_noise_that_it_is_given() -> None:
    head = heads()["flow"]
    cond = batch(8)[0]
    noise = torch.randn(8, *head.noise_shape, generator=generator(5))
    assert torch.equal(head.act(cond, generator(5)), head.act(cond, noise=noise))
    assert not torch.equal(head.act(cond, noise=noise), head.act(cond, noise=-noise))


def test_standard_normal_noise_draws_mixture_components_with_their_probabilities() -> None:
    head = heads()["gmm"]
    count = 20_000
    cond = batch(1)[0].expand(count, -1)
    with torch.no_grad():
        logits, means, _ = head._mixture(cond[:1])
        logits, means = logits[0].softmax(-1), means[0]
        chunks = head.act(cond, noise=torch.randn(count, *head.noise_shape, generator=generator(6)))
        nearest = (chunks[:, None] - means).square().sum((2, 3)).argmin(1)
        shares = torch.bincount(nearest, minlength=len(means)) / count
        assert (shares - logits).abs().max() < 0.02
        assert torch.equal(head.act(cond[:1], noise=torch.zeros(1, *head.noise_shape))[0], means[logits.argmax()])
