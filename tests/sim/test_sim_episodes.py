"""Episodes of a policy: which obs it gets, what is executed, and what one has to do with another."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from policies import HEADS, SHAPES, policy_of
from simulations import Counter, Planner, one, played
from walk import Walk

from cache_pipeline.sim.acting import seeded
from cache_pipeline.sim.custom import FactoryEnvironment, FactoryOpening

OPENING = FactoryOpening("walk.py:make", SHAPES, {"pose": (3,)})


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small arithmetic is many times slower on several threads of a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_half_of_each_chunk_is_executed_before_the_policy_runs_again() -> None:
    env, policy = Counter(goal=7), Planner(chunk=5)
    episode = one(env, policy, horizon=100)
    assert env.done == [0, 1, 2, 10, 11, 12, 20]
    assert (episode.success, episode.steps) == (True, 7)


def test_action_steps_sets_how_many_actions_of_a_chunk_are_executed() -> None:
    env = Counter(goal=4)
    one(env, Planner(chunk=5), horizon=100, action_steps=1)
    assert env.done == [0, 10, 20, 30]


def test_the_policy_gets_the_last_obs_each_time_it_runs() -> None:
    policy = Planner(chunk=4)
    one(Counter(goal=5), policy, horizon=100)
    assert [obs["count"].flatten().tolist() for obs in policy.asked] == [[0, 0], [1, 2], [3, 4]]
    assert [obs["eye_image"][0, :, 0, 0, 0].tolist() for obs in policy.asked] == [[0, 0], [1, 2], [3, 4]]


def test_images_stay_uint8_and_low_dim_becomes_float32() -> None:
    policy = Planner(chunk=1)
    one(Counter(goal=1), policy)
    assert policy.asked[0]["eye_image"].dtype == torch.uint8
    assert policy.asked[0]["eye_image"].shape == (1, 2, 4, 6, 3)
    assert policy.asked[0]["count"].dtype == torch.float32


def test_an_episode_that_never_succeeds_ends_at_the_horizon() -> None:
    episode = one(Counter(goal=1000), Planner(chunk=4), horizon=6)
    assert (episode.success, episode.steps) == (False, 6)


def test_only_the_images_that_the_policy_gets_are_rendered() -> None:
    counter = Counter(goal=7)
    (episode,), _ = played([counter], Planner(chunk=8), horizon=100, action_steps=5)
    assert episode.steps == 7
    assert counter.rendered == [0, 4, 5]  # the last two of five; the episode ends before the next ones
    longer_history = Planner(chunk=4)
    longer_history.obs_horizon = 3
    played([counter := Counter(goal=4)], longer_history, horizon=100, action_steps=2)
    assert counter.rendered == [0, 1, 2, 3, 4]


def test_a_film_has_the_first_and_every_later_image() -> None:
    _, (film, unfilmed) = played([Counter(goal=5)], Planner(chunk=4), (0, 1), horizon=100, filmed=1)
    assert unfilmed is None
    assert film is not None
    assert [int(image[0, 0, 0]) for image in film] == [0, 1, 2, 3, 4, 5]


def test_random_numbers_of_a_policy_depend_only_on_the_seed_and_the_callers_state_is_restored() -> None:
    before = torch.get_rng_state()
    draws = []
    for _ in range(2):
        with seeded(3, torch.device("cpu")):
            draws.append(torch.randn(4))
    assert torch.equal(*draws)
    assert torch.equal(before, torch.get_rng_state())


def walks(count: int) -> list[FactoryEnvironment]:
    return [FactoryEnvironment(Walk(), OPENING) for _ in range(count)]


@pytest.mark.parametrize("head", HEADS)
def test_an_episode_does_not_depend_on_the_episodes_beside_it(head: str) -> None:
    """The actions of Walk are chaotic, so a difference in the last bit of one action changes the results."""
    policy, seeds = policy_of(head), list(range(10))
    alone, films = played(walks(1), policy, seeds, filmed=10)
    for count in (2, 3, 10):
        beside, others = played(walks(count), policy, seeds, filmed=10)
        assert beside == alone
        for film, other in zip(films, others, strict=True):
            np.testing.assert_array_equal(film, other)
    assert 0 < sum(episode.success for episode in alone) < 10
    reordered, _ = played(walks(2), policy, seeds[::-1])
    assert reordered[::-1] == alone


def test_the_policy_is_asked_once_per_tick_for_all_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, sizes = policy_of("flow"), []
    act = policy.act
    monkeypatch.setattr(policy, "act", lambda obs, **drawn: sizes.append(len(obs["pose"])) or act(obs, **drawn))
    monkeypatch.setattr(Walk, "step", lambda self, action: (self._obs(), 0.0, False, False, {}))
    played(walks(4), policy, range(4), horizon=8, action_steps=2)
    assert sizes == [8] * 4  # padded to one size, whatever the number of episodes


@pytest.mark.parametrize(("action_steps", "frames"), [(1, 12), (2, 11), (4, 5)])
def test_a_frame_is_encoded_once_and_only_if_the_policy_gets_it(
    monkeypatch: pytest.MonkeyPatch, action_steps: int, frames: int
) -> None:
    """12 steps: the first obs, then one per call when every step is seen; pairs when four actions are executed."""
    policy, encoded = policy_of("flow"), dict.fromkeys(SHAPES, 0)
    encode = policy.encode

    def counted(camera: str, images: torch.Tensor) -> torch.Tensor:
        encoded[camera] += len({image.numpy().tobytes() for image in images})
        return encode(camera, images)

    monkeypatch.setattr(policy, "encode", counted)
    monkeypatch.setattr("cache_pipeline.sim.custom.succeeded", lambda *result: False)
    assert one(walks(1)[0], policy, action_steps=action_steps).steps == 12
    assert encoded == dict.fromkeys(SHAPES, frames)


def test_features_that_are_kept_give_the_actions_of_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, asked = policy_of("flow", obs_horizon=3), []
    act = policy.act
    monkeypatch.setattr(policy, "act", lambda obs, noise: asked.append((obs, noise)) or act(obs, noise=noise))
    _, (film,) = played(walks(1), policy, filmed=1, action_steps=2, horizon=6)
    assert film is not None
    env = walks(1)[0]
    seen = [env.reset(0)] * 3
    for step in range(3):
        obs, noise = asked[step]
        frames = {key: torch.from_numpy(np.stack([moment[key] for moment in seen[-3:]]))[None] for key in obs}
        wanted = act(frames, noise=noise[:1])
        torch.testing.assert_close(act(obs, noise=noise)[:1], wanted, rtol=1e-5, atol=1e-6)
        for action in act(obs, noise=noise)[0][:2].double().numpy():
            seen.append(env.step(action).obs)


class Stateful(Planner):
    """Remembers how often it was asked since the episode began."""

    def __init__(self) -> None:
        super().__init__(chunk=1)
        self.calls = 0

    def start_episode(self) -> None:
        self.calls = 0

    def act(self, obs: dict[str, torch.Tensor]) -> torch.Tensor:
        self.calls += 1
        return torch.tensor([[[float(self.calls)]]])


class OneEach(Stateful):
    def for_episode(self) -> OneEach:
        return OneEach()


def test_a_policy_with_a_state_has_one_for_each_episode() -> None:
    envs = [Counter(goal=3), Counter(goal=4)]
    played(envs, OneEach(), (0, 1), horizon=9)
    assert [env.done for env in envs] == [[1, 2, 3], [1, 2, 3, 4]]


def test_a_policy_with_one_state_starts_anew_with_each_episode() -> None:
    env, all_done = Counter(goal=3), []
    reset = env.reset
    env.reset = lambda seed: all_done.append(env.done) or reset(seed)  # type: ignore[method-assign]
    played([env], Stateful(), (0, 1), horizon=9)
    assert [*all_done[1:], env.done] == [[1, 2, 3], [1, 2, 3]]


def test_draws_from_torchs_generator_depend_on_the_episode_alone() -> None:
    class Drawing(Planner):
        def act(self, obs: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.rand(1, 1, 1)

    alone = [Counter(goal=3) for _ in range(3)]
    for seed, env in enumerate(alone):
        played([env], Drawing(1), (seed,), horizon=9)
    beside = [Counter(goal=3) for _ in range(3)]
    played(beside, Drawing(1), (0, 1, 2), horizon=9)
    assert [env.done for env in beside] == [env.done for env in alone]
    assert len({tuple(env.done) for env in alone}) == 3


def test_an_episode_ends_when_the_environment_ends_it() -> None:
    env = FactoryEnvironment(Walk(length=5), OPENING)
    episodes, _ = played([env], policy_of("mlp"), range(6))
    assert {episode.steps for episode in episodes if not episode.success} == {5}
