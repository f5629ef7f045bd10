"""Rollouts in a fake environment, and the interval of the success rate."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from simulations import LIFT, CounterEnvironment, Planner

from cache_pipeline.errors import CachePipelineError, ConfigError
from cache_pipeline.sim import rollout as module
from cache_pipeline.sim.config import RolloutConfig
from cache_pipeline.sim.environment import Environment
from cache_pipeline.sim.results import Episode, keep, result_file, settings_of, summarise, wilson_interval
from cache_pipeline.sim.rollout import check_outputs, choose_env_args, episode_seed, rollout
from cache_pipeline.sim.video import video_format


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
        choose_env_args(RolloutConfig(run=Path("runs/x")), Planner(1))


def test_the_given_env_args_override_the_datasets_but_not_its_render_flags(tmp_path: Path) -> None:
    path = tmp_path / "env.json"
    path.write_text(json.dumps({**LIFT, "env_name": "Stack"}))
    chosen = choose_env_args(RolloutConfig(run=Path("x"), env_args=path), Planner(1, LIFT, {"shadow": False}))
    assert chosen.env_args["env_name"] == "Stack"
    assert chosen.render_flags == {"shadow": False}


def test_episode_seeds_differ_between_episodes_and_runs() -> None:
    assert len({episode_seed(seed, index) for seed in range(5) for index in range(20)}) == 100


@pytest.mark.parametrize(
    "wrong", [{"episodes": 0}, {"horizon": 0}, {"action_steps": 0}, {"videos": 0}, {"workers": 0}, {"seed": -1}]
)
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
    monkeypatch.setattr(Environment, "from_env_args", lambda *rest: CounterEnvironment(goal=2))
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
