"""Files written by collect, and the sample in data/; without a simulator."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from kills import killed_at

from cache_pipeline.errors import ConfigError
from cache_pipeline.sim import collect as module
from cache_pipeline.sim.collect import Attempt, Attempts, CollectError, collect, write_masks
from cache_pipeline.sim.collect_config import CollectConfig
from cache_pipeline.sim.demo_file import RecordedDemo, write_demo
from cache_pipeline.sim.tasks.task import LOW_DIM_KEYS

SAMPLE = Path(__file__).parents[2] / "data" / "lift_sample.hdf5"
CAMERAS = ("agentview_image", "robot0_eye_in_hand_image")


def recorded(steps: int) -> RecordedDemo:
    obs = {"agentview_image": np.zeros((steps, 8, 8, 3), np.uint8), "object": np.zeros((steps, 10))}
    zeros = np.zeros(steps)
    return RecordedDemo(
        obs, np.ones((steps, 7)), zeros, zeros.astype(np.int64), np.zeros((steps, 32)), "<mujoco/>", True
    )


def masks(tmp_path: Path, **options: float) -> dict[str, list[str]]:
    config = CollectConfig(out=tmp_path / "x.hdf5", **options)
    with h5py.File(tmp_path / "masks.hdf5", "w") as file:
        write_masks(file, config)
        return {key: [name.decode() for name in names] for key, names in file["mask"].items()} if "mask" in file else {}


def test_a_demo_is_laid_out_as_robomimic_reads_it(tmp_path: Path) -> None:
    config = CollectConfig(out=tmp_path / "x.hdf5", cameras=("agentview_image",))
    with h5py.File(tmp_path / "demo.hdf5", "w") as file:
        write_demo(file.create_group("data/demo_0"), recorded(40), config)
        group = file["data/demo_0"]
        assert sorted(group) == ["actions", "dones", "obs", "rewards", "states"]
        assert group.attrs["num_samples"] == 40
        assert group.attrs["model_file"] == "<mujoco/>"
        images = group["obs/agentview_image"]
        assert (images.chunks, images.compression) == ((16, 8, 8, 3), "gzip")


def test_a_demo_shorter_than_a_chunk_can_be_written(tmp_path: Path) -> None:
    config = CollectConfig(out=tmp_path / "x.hdf5", cameras=("agentview_image",))
    with h5py.File(tmp_path / "demo.hdf5", "w") as file:
        write_demo(file.create_group("demo"), recorded(3), config)
        assert file["demo/obs/agentview_image"].chunks == (3, 8, 8, 3)


def test_train_and_valid_share_the_demos_out_by_the_seed(tmp_path: Path) -> None:
    first, again, other = (masks(tmp_path, demos=15, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert (len(first["train"]), len(first["valid"])) == (13, 2)
    assert sorted(first["train"] + first["valid"]) == sorted(f"demo_{index}" for index in range(15))


@pytest.mark.parametrize(
    ("demos", "fraction", "keys"), [(1, 0.1, ["train"]), (2, 0.1, ["train", "valid"]), (5, 0.0, ["train"])]
)
def test_there_is_no_empty_filter_key(tmp_path: Path, demos: int, fraction: float, keys: list[str]) -> None:
    assert sorted(masks(tmp_path, demos=demos, valid_fraction=fraction)) == keys


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"task": "Lfit"}, "no scripted expert.*did you mean Lift"),
        ({"demos": 0}, "demos is 0"),
        ({"image_size": 0}, "image_size is 0"),
        ({"noise": -0.1}, "noise"),
        ({"valid_fraction": 1.0}, "valid_fraction"),
        ({"gzip_level": 10}, "gzip_level"),
        ({"seed": -1}, "seed"),
        ({"cameras": ("agentview",)}, "did you mean agentview_image"),
    ],
)
def test_options_out_of_range_or_unknown_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CollectConfig(out=Path("x.hdf5"), **wrong)


def test_a_file_that_exists_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "x.hdf5"
    out.write_text("precious")
    with pytest.raises(ConfigError, match="--overwrite"):
        collect(CollectConfig(out=out))
    assert out.read_text() == "precious"


class NoEnvironment:
    """Stands in where episodes are made up."""

    def __enter__(self) -> NoEnvironment:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def make_up(
    monkeypatch: pytest.MonkeyPatch,
    succeeds: Callable[[int], bool],
    *,
    seconds: float = 0.0,
    made: list[int] | None = None,
) -> None:
    """Replaces the simulator: attempt i takes some time, gives 40 + i steps and succeeds as told."""

    def record(env: object, config: CollectConfig, *, attempt: int) -> RecordedDemo:
        time.sleep(seconds)
        if made is not None:
            made.append(attempt)
        return recorded(40 + attempt)._replace(success=succeeds(attempt))

    monkeypatch.setattr(module, "make_env_args", lambda config: {"env_name": config.task})
    monkeypatch.setattr(module.Environment, "from_env_args", lambda *args: NoEnvironment())
    monkeypatch.setattr(module, "record_demo", record)


def test_failed_episodes_are_left_out_and_demo_names_have_no_gaps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_up(monkeypatch, lambda attempt: attempt % 2 == 1)
    result = collect(CollectConfig(out=tmp_path / "new" / "x.hdf5", demos=3), progress=False)
    with h5py.File(result.out) as file:
        lengths = {name: int(demo.attrs["num_samples"]) for name, demo in file["data"].items()}
        assert file["data"].attrs["total"] == result.steps == 129
        assert (file["data"].attrs["attempts"], file["data"].attrs["failed_attempts"]) == (6, 3)
    assert list(tmp_path.joinpath("new").iterdir()) == [result.out]
    assert lengths == {"demo_0": 41, "demo_1": 43, "demo_2": 45}
    assert (result.demos, result.attempts, result.failed) == (3, 6, 3)
    assert "x.hdf5: 3 demos of 6 attempts, 3 failed and left out; 129 steps" in result.lines()[0]


def test_an_expert_that_never_succeeds_ends_with_an_error_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_up(monkeypatch, lambda attempt: False)
    with pytest.raises(CollectError, match="only 0 of 10 attempts of Lift succeeded"):
        collect(CollectConfig(out=tmp_path / "x.hdf5", demos=2), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_attempts_are_the_same_in_whatever_order_they_end() -> None:
    """In any number of processes the demos are the first successes, and only attempts after a failure are in vain."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        succeeds = rng.random(60) < rng.choice([0.1, 0.5, 0.9])
        demos, workers = int(rng.integers(1, 5)), int(rng.integers(1, 5))
        before = {int(number): bool(succeeds[number]) for number in rng.integers(0, 8, int(rng.integers(0, 5)))}
        one, many = Attempts(demos, {}), Attempts(demos, before)
        made = run_attempts(one, succeeds, rng, workers=1)
        run_attempts(many, succeeds, rng, workers)
        assert one.chosen() == many.chosen()
        chosen, count = one.chosen()
        assert made == list(range(count))
        assert len(chosen) == min(demos, int(succeeds[:count].sum()))


def run_attempts(attempts: Attempts, succeeds: np.ndarray, rng: np.random.Generator, workers: int) -> list[int]:
    """Ends running attempts in a random order; returns the numbers in the order in which they were handed out."""
    running: list[Attempt] = []
    order = []
    while True:
        while len(running) < workers and (unit := attempts.next()) is not None:
            running.append(unit)
            order.append(unit.number)
        if not running:
            return order
        unit = running.pop(int(rng.integers(len(running))))
        attempts.done(unit, bool(succeeds[unit.number]))


def test_a_collect_that_is_killed_goes_on_and_the_file_is_that_of_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_up(monkeypatch, lambda attempt: attempt % 3 != 1, seconds=0.03)
    whole = collect(CollectConfig(out=tmp_path / "whole.hdf5", demos=6), progress=False)
    config = CollectConfig(out=tmp_path / "killed" / "x.hdf5", demos=6)
    config.out.parent.mkdir()
    for parts in (2, 5):
        killed_at(collect, config, parts)
    made: list[int] = []
    make_up(monkeypatch, lambda attempt: attempt % 3 != 1, made=made)
    result = collect(config, progress=False)
    assert made
    assert set(made) <= set(range(5, whole.attempts)), "an attempt that was finished, or had failed, was made again"
    assert result.out.read_bytes() == whole.out.read_bytes()
    assert (result.attempts, result.failed) == (whole.attempts, whole.failed) == (9, 3)
    assert [path.name for path in config.out.parent.iterdir()] == ["x.hdf5"]


def test_attempts_of_other_settings_are_not_used_but_those_for_fewer_demos_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_up(monkeypatch, lambda attempt: True, seconds=0.03)
    config = CollectConfig(out=tmp_path / "x.hdf5", demos=4)
    killed_at(collect, config, 3)
    made: list[int] = []
    make_up(monkeypatch, lambda attempt: True, made=made)
    collect(replace(config, seed=1), progress=False)
    assert made == [0, 1, 2, 3]
    assert "3 finished attempts of an interrupted command with other settings (seed is 0 there and 1" in caplog.text
    made.clear()
    collect(replace(config, demos=5, valid_fraction=0.5, overwrite=True), progress=False)
    assert made == [3, 4]


def test_the_file_that_is_replaced_stays_until_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_up(monkeypatch, lambda attempt: True)
    config = CollectConfig(out=tmp_path / "x.hdf5", demos=2)
    before = collect(config, progress=False).out.read_bytes()

    def interrupted(attempt: int) -> bool:
        if attempt == 1:
            raise KeyboardInterrupt
        return True

    make_up(monkeypatch, interrupted)
    again = replace(config, seed=1, overwrite=True)
    with pytest.raises(KeyboardInterrupt, match="1 finished attempt is kept; run the same command again to continue"):
        collect(again, progress=False)
    assert config.out.read_bytes() == before
    make_up(monkeypatch, lambda attempt: True)
    with h5py.File(collect(again, progress=False).out) as file:
        assert len(file["data"]) == 2


def test_the_sample_is_small_whole_and_names_no_machine() -> None:
    assert SAMPLE.stat().st_size < 8e6
    with h5py.File(SAMPLE) as file:
        assert {key: len(names) for key, names in file["mask"].items()} == {"train": 13, "valid": 2}
        assert file["data"].attrs["total"] == sum(demo.attrs["num_samples"] for demo in file["data"].values())
        assert json.loads(file["data"].attrs["render_flags"]) == {"shadow": False, "reflection": False}
        for demo in file["data"].values():
            steps = demo.attrs["num_samples"]
            assert {len(values) for values in demo["obs"].values()} == {steps}
            assert sorted(demo["obs"]) == sorted((*CAMERAS, *LOW_DIM_KEYS))
            assert demo["dones"][-5:].tolist() == [1] * 5
            assert 'file="robosuite/' in demo.attrs["model_file"]
            assert 'file="/' not in demo.attrs["model_file"]
