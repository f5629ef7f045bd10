"""Rollouts during training: curves, the best checkpoint, and that training goes on as without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import CAMERAS, LOW_DIM, make_dataset
from training_runs import config, extracted
from typer.testing import CliRunner

import cache_pipeline.sim.rollout as rollout_module
from cache_pipeline.cli import app
from cache_pipeline.errors import ConfigError, RunStopped
from cache_pipeline.runs.checkpoint import Best, Score, find_checkpoint, read_checkpoint, read_index
from cache_pipeline.runs.metrics import read_metrics
from cache_pipeline.sim.environment import Environment, Step
from cache_pipeline.sim.rollout import episode_seed
from cache_pipeline.training.config import FinetuneConfig, SavingConfig, TrainConfig
from cache_pipeline.training.finetune import finetune
from cache_pipeline.training.interrupt import StopRequest
from cache_pipeline.training.rollouts import FIRST_EPISODE
from cache_pipeline.training.train import train

EPISODES = 2


class Scripted:
    """Random obs; the k-th rollout of two episodes has ``script[k]`` successes. Draws from torch's generator."""

    over, horizon = False, 6
    opened: list[Scripted] = []  # noqa: RUF012

    def __init__(self, script: Sequence[int]) -> None:
        self.script, self.seeds, self.actions, self.closed = script, [], [], False
        Scripted.opened.append(self)

    def reset(self, seed: int) -> dict[str, np.ndarray]:
        self.seeds.append(seed)
        self.steps = 0
        self.random = np.random.default_rng(seed)
        return self._obs()

    def step(self, action: np.ndarray, *, images: bool = True) -> Step:
        self.actions.append(action)
        self.steps += 1
        torch.rand(1)
        done, episode = divmod(len(self.seeds) - 1, EPISODES)
        return Step(self._obs(), 0.0, self.steps == 3 and episode < self.script[done])

    def _obs(self) -> dict[str, np.ndarray]:
        images = {name: self.random.integers(0, 256, shape, np.uint8) for name, shape in CAMERAS.items()}
        return {**images, **{key: self.random.normal(size=width) for key, width in LOW_DIM.items()}}

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def _scripted() -> Iterator[None]:
    Scripted.opened.clear()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def script(monkeypatch: pytest.MonkeyPatch, *successes: int) -> None:
    monkeypatch.setattr(Environment, "from_env_args", lambda *arguments: Scripted(successes))


def saving(**options: Any) -> SavingConfig:
    given = {"log_every": 1, "eval_every": 2, "save_every": 0, "rollout_every": 2, "rollout_episodes": EPISODES}
    return SavingConfig(**{**given, **options})


def rates(run: Path) -> list[tuple[int, float]]:
    rows = read_metrics(run)
    return [(row["step"], row["rollout/success_rate"]) for row in rows if row["rollout/success_rate"] is not None]


def weights(run: Path) -> dict[str, torch.Tensor]:
    state = read_checkpoint(find_checkpoint(run, latest=True)[1]).state
    return {**state.model, **state.ema, **state.resume}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_success_is_in_the_curves_and_the_best_checkpoint_is_that_of_highest_success(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, 1, 2, 0, 2)
    result = train(config(tmp_path / "run", cache, steps=8, saving=saving(keep_best=2)), progress=False)
    assert rates(result.run) == [(2, 0.5), (4, 1.0), (6, 0.0), (8, 1.0)]
    assert {row["rollout/episodes"] for row in read_metrics(result.run)} == {None, 2.0}
    best = read_index(result.run).best
    assert {entry.step for entry in best} == {4, 8}
    assert best[0].valid_action_mse is not None
    assert best[1].valid_action_mse is not None
    assert best[0].valid_action_mse <= best[1].valid_action_mse  # a tie
    assert (result.success_rate, result.best_success_rate, result.best_step) == (1.0, 1.0, best[0].step)
    assert "success in simulation 100% after the last step, 100% with the best checkpoint" in result.lines()
    (env,) = Scripted.opened  # built once
    assert env.closed
    assert env.seeds == [episode_seed(0, FIRST_EPISODE + index) for index in range(2)] * 4


def test_rollouts_run_in_as_many_processes_as_asked_for(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, 1)
    asked, opened = [], rollout_module.opened

    def in_this_process(opening: Any, keys: tuple[str, ...], workers: int) -> Any:
        asked.append(workers)
        return opened(opening, keys, 1)

    monkeypatch.setattr(rollout_module, "opened", in_this_process)
    train(config(tmp_path / "run", cache, steps=2, saving=saving(rollout_workers=2)), progress=False)
    assert asked == [2]


def test_training_goes_on_as_without_rollouts(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, 0, 0, 0)
    options = {"steps": 6, "feature_noise": 0.1}
    with_them = train(config(tmp_path / "with", cache, saving=saving(), **options), progress=False)
    without = train(config(tmp_path / "without", cache, saving=saving(rollout_every=0), **options), progress=False)
    assert same(weights(with_them.run), weights(without.run))
    assert without.success_rate is None
    assert rates(without.run) == []


def test_a_stopped_run_goes_on_with_the_rollouts_that_are_still_to_come(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after step 3, between two rollouts: those of step 2 are not repeated, those of 4 and 6 are made."""
    script(monkeypatch, 2, 1, 1)
    whole = train(config(tmp_path / "whole", cache, steps=6, saving=saving()), progress=False)
    asked = iter([False, False, True, *[False] * 9])
    signals = property(lambda self: int(next(asked)), lambda self, value: None)
    monkeypatch.setattr(StopRequest, "signals", signals, raising=False)
    with pytest.raises(RunStopped):
        train(config(tmp_path / "run", cache, steps=6, saving=saving()), progress=False)
    assert rates(tmp_path / "run") == [(2, 1.0)]
    latest = find_checkpoint(tmp_path / "run", latest=True)[1]
    assert "rollout/success_rate" not in read_checkpoint(latest).metrics  # it is not that of step 3
    script(monkeypatch, 1, 1)
    train(config(tmp_path / "run", cache, steps=6, saving=saving(), resume=True), progress=False)
    assert rates(tmp_path / "run") == rates(whole.run) == [(2, 1.0), (4, 0.5), (6, 0.5)]
    assert [entry.step for entry in read_index(tmp_path / "run").best] == [2]
    assert same(weights(tmp_path / "run"), weights(whole.run))


def test_resuming_without_rollouts_says_that_the_best_checkpoint_stays(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script(monkeypatch, 1)
    run = train(config(tmp_path / "run", cache, steps=2, saving=saving()), progress=False).run
    assert "chosen by success" not in caplog.text
    resumed = config(run, cache, steps=4, saving=saving(rollout_every=0), resume=True)
    train(resumed, progress=False)
    assert "the best checkpoint of this run was chosen by success in rollouts" in caplog.text
    assert [entry.step for entry in read_index(run).best] == [2]


def test_a_checkpoint_without_rollouts_is_never_the_best_beside_one_with_them(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, 0, 0)
    options = saving(eval_every=1, save_every=1, rollout_every=3, keep_best=9)
    run = train(config(tmp_path / "run", cache, steps=5, saving=options), progress=False).run
    assert {entry.step for entry in read_index(run).best} == {3, 5}
    (run / "checkpoints/index.json").write_text("{")
    assert read_index(run).best[0].success_rate == 0.0  # rebuilt from the metrics of the checkpoints


def test_the_environment_is_opened_before_anything_is_written(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data.hdf5", env_args=None, lengths=(9, 8))
    cache = extracted(dataset, tmp_path / "data.zarr")
    with pytest.raises(ConfigError, match=r"--rollout-every needs an environment, but the data have no env_args"):
        train(config(tmp_path / "run", cache, saving=saving()), progress=False)
    assert not (tmp_path / "run").exists()


OWN = """
from pathlib import Path

import numpy as np

Path({witness!r}).touch()


class Own:
    def reset(self, *, seed):
        self.steps = 0
        return self.obs(), {{}}

    def step(self, action):
        self.steps += 1
        return self.obs(), 0.0, False, self.steps == 5, {{"is_success": self.steps == 3}}

    def obs(self):
        images = {{name: np.zeros(shape, np.uint8) for name, shape in {cameras!r}.items()}}
        return {{**images, **{{key: np.zeros(width, np.float32) for key, width in {low_dim!r}.items()}}}}


def make():
    return Own()
"""


def test_rollouts_run_in_an_environment_of_the_users_own_if_the_command_names_it(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data.hdf5", env_args=None, lengths=(9, 8))
    cache, witness, own = extracted(dataset, tmp_path / "data.zarr"), tmp_path / "witness", tmp_path / "own.py"
    own.write_text(OWN.format(witness=str(witness), cameras=CAMERAS, low_dim=LOW_DIM))
    named = saving(rollout_env=f"{own}:make")
    result = train(config(tmp_path / "run", cache, steps=2, saving=named), progress=False)
    assert rates(result.run) == [(2, 1.0)]
    assert witness.exists()
    witness.unlink()
    words = ["train", "--config", tmp_path / "run" / "run.json", "--out", tmp_path / "again"]
    refused = CliRunner().invoke(app, ["--quiet", *map(str, words)])
    assert refused.exit_code == 1
    assert "give --rollout-env FILE.py:make" in refused.stderr
    with pytest.raises(ConfigError, match=r"there is no file gone\.py for the environment"):
        train(config(tmp_path / "gone", cache, saving=saving(rollout_env="gone.py:make")), progress=False)
    assert not witness.exists()


def test_fine_tuning_measures_success_before_the_first_step(
    cache: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = train(config(tmp_path / "base", cache, steps=2), progress=False).run
    script(monkeypatch, 2, 1)
    options = FinetuneConfig(
        checkpoint=base, out=tmp_path / "tuned", unfreeze="layer4", steps=2, batch_size=4, device="cpu",
        precision="fp32", saving=saving(),
    )  # fmt: skip
    result = finetune(options, progress=False)
    assert rates(result.run) == [(0, 1.0), (2, 0.5)]
    assert (result.best_step, result.best_success_rate) == (0, 1.0)


def test_checkpoints_are_ordered_by_success_then_error_then_step() -> None:
    entries = [
        Best("a", 1, 0.1, None), Best("b", 2, 0.9, 0.5), Best("c", 3, None, 0.5), Best("d", 4, 0.9, 0.75),
        Best("e", 5, 0.2, 0.5), Best("f", 6, 0.2, 0.5), Best("g", 7, 0.05, None),
    ]  # fmt: skip
    assert "".join(entry.name for entry in sorted(entries, key=lambda entry: entry.order)) == "defbcga"
    assert Score(0.5).order < Score(0.6).order


def test_rollouts_cannot_be_negative() -> None:
    with pytest.raises(ConfigError, match="rollout_every"):
        SavingConfig(rollout_every=-1)
    assert TrainConfig(cache="x").saving.rollout_every == 0
