"""Rollouts in a fake environment, and the interval of the success rate."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_pipeline.errors import CachePipelineError, ConfigError
from cache_pipeline.sim import rollout as module
from cache_pipeline.sim.config import RolloutConfig
from cache_pipeline.sim.environment import Step
from cache_pipeline.sim.history import ObsHistory
from cache_pipeline.sim.results import Episode, keep, result_file, settings_of, summarise, wilson_interval
from cache_pipeline.sim.rollout import (
    _seeded,
    ask,
    check_outputs,
    choose_environment,
    episode_seed,
    rollout,
    run_episode,
)
from cache_pipeline.sim.video import video_format

LIFT = {"env_name": "Lift", "type": 1, "env_kwargs": {}}


class Counter:
    """Counts its actions; succeeds when ``goal`` of them were done."""

    def __init__(self, goal: int) -> None:
        self.goal, self.done = goal, []

    def reset(self, seed: int) -> dict[str, np.ndarray]:
        self.done = []
        return self._obs()

    def step(self, action: np.ndarray) -> Step:
        self.done.append(float(action[0]))
        return Step(self._obs(), 0.0, len(self.done) >= self.goal)

    def _obs(self) -> dict[str, np.ndarray]:
        return {"eye_image": np.full((4, 6, 3), len(self.done), np.uint8), "count": np.array([float(len(self.done))])}


class Planner:
    """Answers the k-th question with the chunk [10k, 10k + 1, …] and remembers what it was asked."""

    cameras: Mapping[str, tuple[int, ...]] = {"eye_image": (4, 6, 3)}
    low_dim: Mapping[str, tuple[int, ...]] = {"count": (1,)}
    obs_horizon = 2

    def __init__(
        self, chunk: int, env_args: dict[str, Any] | None = None, flags: dict[str, bool] | None = None
    ) -> None:
        self.chunk, self.env_args, self.render_flags = chunk, env_args, flags
        self.asked: list[dict[str, torch.Tensor]] = []

    def act(self, obs: dict[str, torch.Tensor]) -> torch.Tensor:
        self.asked.append(obs)
        first = 10 * (len(self.asked) - 1)
        return torch.arange(first, first + self.chunk, dtype=torch.float32).view(1, self.chunk, 1)


def test_half_of_each_chunk_is_executed_before_the_policy_runs_again() -> None:
    env, policy = Counter(goal=7), Planner(chunk=5)
    episode = run_episode(env, policy, seed=0, horizon=100)
    assert env.done == [0, 1, 2, 10, 11, 12, 20]
    assert (episode.success, episode.steps) == (True, 7)


def test_action_steps_sets_how_many_actions_of_a_chunk_are_executed() -> None:
    env = Counter(goal=4)
    run_episode(env, Planner(chunk=5), seed=0, horizon=100, action_steps=1)
    assert env.done == [0, 10, 20, 30]


def test_the_policy_gets_the_last_obs_each_time_it_runs() -> None:
    policy = Planner(chunk=4)
    run_episode(Counter(goal=5), policy, seed=0, horizon=100)
    assert [obs["count"].flatten().tolist() for obs in policy.asked] == [[0, 0], [1, 2], [3, 4]]
    assert [obs["eye_image"][0, :, 0, 0, 0].tolist() for obs in policy.asked] == [[0, 0], [1, 2], [3, 4]]


def test_images_stay_uint8_and_low_dim_becomes_float32() -> None:
    policy = Planner(chunk=1)
    history = ObsHistory(("eye_image", "count"), 2)
    history.start(Counter(1).reset(0))
    assert ask(policy, history, "cpu").shape == (1, 1)
    assert policy.asked[0]["eye_image"].dtype == torch.uint8
    assert policy.asked[0]["eye_image"].shape == (1, 2, 4, 6, 3)
    assert policy.asked[0]["count"].dtype == torch.float32


def test_an_episode_that_never_succeeds_ends_at_the_horizon() -> None:
    episode = run_episode(Counter(goal=1000), Planner(chunk=4), seed=0, horizon=6)
    assert (episode.success, episode.steps) == (False, 6)


def test_a_film_has_the_first_and_every_later_image() -> None:
    film: list[np.ndarray] = []
    run_episode(Counter(goal=5), Planner(chunk=4), seed=0, horizon=100, film=film)
    assert [int(image[0, 0, 0]) for image in film] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (8, 10, 0.4902, 0.9433),
        (1, 1, 0.2065, 1.0),
        (50, 100, 0.4038, 0.5962),
    ],
)
def test_wilson_interval_equals_published_values(successes: int, episodes: int, low: float, high: float) -> None:
    assert wilson_interval(successes, episodes) == pytest.approx((low, high), abs=1e-4)


def test_the_result_has_the_fields_that_scripts_rely_on() -> None:
    result = summarise([Episode(1, True, 5, 0.1), Episode(2, False, 9, 0.2, "a.mp4")], 1.5)
    value = json.loads(json.dumps(result.to_json()))
    assert {key: value[key] for key in ("episodes", "successes", "success_rate", "seconds")} == {
        "episodes": 2,
        "successes": 1,
        "success_rate": 0.5,
        "seconds": 1.5,
    }
    assert len(value["ci95"]) == 2
    assert value["records"][1]["video"] == "a.mp4"
    assert "1 of 2 episodes" in result.lines()[0]


def test_a_run_without_env_args_is_an_error_that_names_the_option() -> None:
    with pytest.raises(ConfigError, match=r"no env_args.*--env-args FILE"):
        choose_environment(RolloutConfig(run=Path("runs/x")), Planner(1))


def test_the_given_env_args_override_the_datasets_but_not_its_render_flags(tmp_path: Path) -> None:
    path = tmp_path / "env.json"
    path.write_text(json.dumps({**LIFT, "env_name": "Stack"}))
    chosen = choose_environment(RolloutConfig(run=Path("x"), env_args=path), Planner(1, LIFT, {"shadow": False}))
    assert chosen.env_args["env_name"] == "Stack"
    assert chosen.render_flags == {"shadow": False}


def test_episode_seeds_differ_between_episodes_and_runs() -> None:
    assert len({episode_seed(seed, index) for seed in range(5) for index in range(20)}) == 100


def test_random_numbers_of_a_policy_depend_only_on_the_seed_and_the_callers_state_is_restored() -> None:
    before = torch.get_rng_state()
    draws = []
    for _ in range(2):
        with _seeded(3, "cpu"):
            draws.append(torch.randn(4))
    assert torch.equal(*draws)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("wrong", [{"episodes": 0}, {"horizon": 0}, {"action_steps": 0}, {"videos": 0}, {"seed": -1}])
def test_options_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        RolloutConfig(run=Path("x"), **wrong)


@pytest.mark.parametrize("overwrite", [False, True])
def test_existing_output_files_are_reported_before_any_episode(tmp_path: Path, overwrite: bool) -> None:
    suffix, kind = video_format()
    video = tmp_path / f"episode_001_failure{suffix}"
    config = RolloutConfig(run=tmp_path / "gone", video=tmp_path, overwrite=overwrite)
    check_outputs(config)
    video.write_bytes(b"the user's own notes")
    with pytest.raises(ConfigError, match=f"is not {kind.name}"):
        rollout(config, policy=Planner(1))
    assert video.read_bytes() == b"the user's own notes"
    video.write_bytes(b"\0\0\0\x20ftypisom" if suffix == ".mp4" else b"GIF89a")
    if overwrite:
        check_outputs(config)
    else:
        with pytest.raises(ConfigError, match="replace it with --overwrite"):
            check_outputs(config)
    check_outputs(RolloutConfig(run=tmp_path / "gone", video=tmp_path, videos=1))


def test_a_result_of_other_settings_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step_0000002"
    checkpoint.mkdir(parents=True)
    monkeypatch.setattr("cache_pipeline.runs.checkpoint.find_checkpoint", lambda run: (tmp_path / "run", checkpoint))

    def kept(successes: int, **options: Any) -> Path:
        config = RolloutConfig(run=tmp_path / "run", episodes=2, **options)
        records = [Episode(0, number < successes, 9, 0.1) for number in range(2)]
        check_outputs(config)
        return keep(summarise(records, 1.0), config, settings_of(config))

    first, again = kept(1), kept(2)
    assert first == again == tmp_path / "run/rollouts/seed_0_2.json"
    value = json.loads(first.read_text())
    assert value["successes"] == 2
    assert value["settings"] == {"checkpoint": "step_0000002", "horizon": None, "action_steps": None, "env_args": None}
    others = [kept(0, horizon=50), kept(0, action_steps=3), kept(0, horizon=50)]
    assert [path.name for path in others] == ["seed_0_2_2.json", "seed_0_2_3.json", "seed_0_2_2.json"]
    assert json.loads(first.read_text()) == value
    checkpoint.with_name("step_0000004").mkdir()
    checkpoint = checkpoint.with_name("step_0000004")
    assert kept(0).name == "seed_0_2_4.json"


def test_a_result_without_settings_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "checkpoints" / "step_0000002"
    monkeypatch.setattr("cache_pipeline.runs.checkpoint.find_checkpoint", lambda run: (tmp_path, checkpoint))
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts/seed_0_1.json").write_text('{"episodes": 1, "successes": 1, "records": []}')
    config = RolloutConfig(run=tmp_path, episodes=1)
    assert result_file(config, settings_of(config)).name == "seed_0_1_2.json"


class CounterEnvironment(Counter):
    """A ``Counter`` in place of the simulator."""

    def __enter__(self) -> CounterEnvironment:
        return self

    def __exit__(self, *error: object) -> None:
        pass


FULL = OSError(errno.ENOSPC, "No space left on device", "films/x")


@pytest.mark.parametrize("finished", [0, 2])
@pytest.mark.parametrize("end", [FULL, KeyboardInterrupt()], ids=["full disk", "interrupt"])
def test_a_rollout_that_ends_early_says_which_videos_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: int, end: BaseException
) -> None:
    written: list[Path] = []

    def write(path: Path, *rest: Any, **options: Any) -> Path:
        if len(written) == finished:
            raise end
        written.append(path)
        return path

    monkeypatch.setattr(module, "write_video", write)
    monkeypatch.setattr(module.Environment, "from_env_args", lambda *rest: CounterEnvironment(goal=2))
    config = RolloutConfig(run=tmp_path / "gone", episodes=5, video=tmp_path / "films", horizon=3)
    with pytest.raises((CachePipelineError, OSError, KeyboardInterrupt)) as caught:
        rollout(config, policy=Planner(1, LIFT), progress=False)
    if not finished:
        assert caught.value is end
        return
    assert isinstance(caught.value, KeyboardInterrupt if isinstance(end, KeyboardInterrupt) else CachePipelineError)
    said = str(caught.value)
    assert f"2 finished videos stay in {tmp_path / 'films'}" in said
    assert "run the same command again with --overwrite" in said
    assert ("films/x: no space left" in said) == (end is FULL)
