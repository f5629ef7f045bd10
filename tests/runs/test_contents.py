"""A run knows its demos by what they hold: order and paths of files may change, frames and actions may not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import pytest
from fakes import make_dataset
from training_runs import ENCODER, PREPROCESS, config, extracted, losses

from cache_pipeline.errors import CheckpointError, DatasetError, StaleCacheError
from cache_pipeline.runs import contents
from cache_pipeline.runs.record import read_record
from cache_pipeline.training.config import FinetuneConfig, SavingConfig, TrainConfig
from cache_pipeline.training.finetune import finetune
from cache_pipeline.training.train import train

LENGTHS = (7, 5, 9)
CAMERAS = {"agentview_image": (24, 24, 3)}


def files(folder: Path, **options: Any) -> tuple[Path, Path]:
    options = {"lengths": LENGTHS, "masks": {}, "cameras": CAMERAS, **options}
    return make_dataset(folder / "a.hdf5", seed=0, **options), make_dataset(folder / "b.hdf5", seed=1, **options)


def held_out(run: Path) -> set[tuple[str, str]]:
    """(file, demo) of what a run holds out."""
    data = read_record(run).data
    return {(Path(data.datasets[demo.file]).name, demo.name) for demo in data.valid}


def live(run: Path, paths: tuple[Path, ...], **options: Any) -> TrainConfig:
    saving = SavingConfig(log_every=1, eval_every=0, save_every=3)
    return config(run, datasets=paths, encoder=ENCODER, preprocess=PREPROCESS, saving=saving, **options)


def tuned(run: Path, name: str, **options: Any) -> Path:
    small: dict[str, Any] = {"steps": 1, "batch_size": 4, "device": "cpu", "precision": "fp32"}
    saving = SavingConfig(eval_every=0)
    made = FinetuneConfig(checkpoint=run, out=run.with_name(name), saving=saving, **small, **options)
    return finetune(made, progress=False).run


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """A live run on a.hdf5 and b.hdf5 that was stopped after three of six steps."""
    from cache_pipeline.training.update.learner import PolicyLearner

    step = PolicyLearner.step

    def stop(self: PolicyLearner, batch: Any, number: int) -> Any:
        if number == 3:
            raise KeyboardInterrupt
        return step(self, batch, number)

    asked = live(tmp_path / "run", files(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(PolicyLearner, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(asked, progress=False)
    return asked


def test_a_resumed_run_takes_its_files_in_any_order_and_from_anywhere(tmp_path: Path, stopped: TrainConfig) -> None:
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    train(replace(stopped, resume=True), progress=False)
    moved = [shutil.copyfile(tmp_path / f"{name}.hdf5", tmp_path / f"moved_{name}.hdf5") for name in ("b", "a")]
    train(replace(stopped, resume=True, out=tmp_path / "other", datasets=tuple(moved)), progress=False)
    assert losses(tmp_path / "other") == losses(tmp_path / "run")


def change_one_frame(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        images = file["data/demo_1/obs/agentview_image"]
        changed = images[3]
        changed[0, 0, 0] ^= 1
        images[3] = changed


def change_one_action(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["data/demo_1/actions"][2, 0] += 0.125


def make_anew(path: Path) -> None:
    make_dataset(path, lengths=LENGTHS, seed=77, masks={}, cameras=CAMERAS)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (change_one_frame, "demo_1, a demo of .*run, is not in the data: its agentview_image differs"),
        (change_one_action, "demo_1, a demo of .*run, is not in the data: its actions differs"),
        (make_anew, "demo_., a demo of .*run, is not in the data: its .*agentview_image.*differ"),
    ],
)
def test_other_content_under_the_old_names_is_refused(
    tmp_path: Path, stopped: TrainConfig, change: Any, what: str
) -> None:
    change(tmp_path / "a.hdf5")
    with pytest.raises(CheckpointError, match=what) as caught:
        train(replace(stopped, resume=True), progress=False)
    assert "\n" not in str(caught.value)


def test_files_that_have_not_changed_are_not_read_to_be_known_again(
    tmp_path: Path, stopped: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("frames are read")

    with monkeypatch.context() as patch:
        patch.setattr(contents, "demo_digests", fail)
        train(replace(stopped, resume=True, steps=6), progress=False)
        with pytest.raises(AssertionError, match="frames are read"):
            train(replace(stopped, resume=True, deep=True), progress=False)


def test_fine_tuning_holds_out_what_the_run_held_out_whatever_the_order_of_files(tmp_path: Path) -> None:
    first, second = files(tmp_path)
    cache = extracted(first, tmp_path / "c.zarr", datasets=(first, second))
    run = train(config(tmp_path / "run", cache, steps=2), progress=False).run
    before = held_out(run)
    assert before == held_out(tuned(run, "with_cache", datasets=(second, first)))
    cache.rename(tmp_path / "moved.zarr")
    assert before == held_out(tuned(run, "without_cache", datasets=(second, first)))
    make_anew(second)
    make_anew(first)
    with pytest.raises(CheckpointError, match="is not in the data: its"):
        tuned(run, "other", datasets=(first, second))


def test_a_run_of_before_contents_were_recorded_is_found_by_name(tmp_path: Path, stopped: TrainConfig) -> None:
    value = json.loads((tmp_path / "run" / "run.json").read_text())
    for name in ("contents", "files"):
        del value["data"][name]
    (tmp_path / "run" / "run.json").write_text(json.dumps(value))
    assert train(replace(stopped, resume=True), progress=False).steps == 6


def test_a_cache_and_its_files_record_the_same_contents(tmp_path: Path) -> None:
    first, _ = files(tmp_path)
    cache = extracted(first, tmp_path / "c.zarr")
    runs = [
        train(made, progress=False).run
        for made in (config(tmp_path / "cached", cache, steps=1), live(tmp_path / "live", (first,), steps=1))
    ]
    one, two = (read_record(run).data for run in runs)
    assert (one.train, one.valid, one.files) == (two.train, two.valid, two.files)
    assert None not in [demo.contents for demo in one.demos]


def test_training_and_fine_tuning_compare_a_cache_with_its_files(tmp_path: Path, frontier: Path, dataset: Path) -> None:
    data, cache = shutil.copy2(dataset, tmp_path / "data.hdf5"), tmp_path / "c.zarr"
    extracted(data, cache, encoders=replace(ENCODER, cut="layer3"))
    run = train(config(tmp_path / "run", cache, steps=1), progress=False).run
    change_one_frame(data)
    frame = r"demo demo_1 camera agentview_image frame 3"
    with pytest.raises(StaleCacheError, match=frame):
        train(config(tmp_path / "again", cache), progress=False)
    with pytest.raises(StaleCacheError, match=frame):
        train(config(tmp_path / "again", cache, datasets=(data,), source="live"), progress=False)
    with pytest.raises(StaleCacheError, match=frame):
        tuned(run, "tuned", cache=cache, unfreeze="layer4")
    other = make_dataset(tmp_path / "other.hdf5", seed=9)
    with pytest.raises(StaleCacheError, match=r"dataset is 'small\.hdf5' in the cache"):
        train(
            config(tmp_path / "again", frontier, datasets=(other,)),
            progress=False,
        )
    with pytest.raises(DatasetError, match=r"there is no file .*gone\.hdf5"):
        train(config(tmp_path / "again", frontier, datasets=(tmp_path / "gone.hdf5",)), progress=False)
    assert not (tmp_path / "again").exists()
