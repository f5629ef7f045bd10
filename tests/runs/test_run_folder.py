"""A run folder under kills, errors and other writers. Kills are real: a forked process ends within a system call."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_fakes import TINY
from training_runs import config

from cache_pipeline import files
from cache_pipeline.cache.lock import writer_lock
from cache_pipeline.encoders.image_encoder import build_encoder
from cache_pipeline.errors import CheckpointError, RunLockedError
from cache_pipeline.policies.batch import Batch
from cache_pipeline.policies.spec import PolicySpec
from cache_pipeline.runs import folder as run_folder_module
from cache_pipeline.runs.checkpoint import CheckpointFolder, State, find_checkpoint, read_checkpoint, read_index
from cache_pipeline.runs.folder import run_folder
from cache_pipeline.runs.metrics import read_metrics
from cache_pipeline.runs.policy import load_policy
from cache_pipeline.runs.record import DataRecord, RunRecord, read_record
from cache_pipeline.runs.summary import inspect_run
from cache_pipeline.training.train import train
from cache_pipeline.training.update.learner import PolicyLearner

CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir")
ENCODER = build_encoder(TINY)
FORKS = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def state(mark: int) -> State:
    """Something to save, told apart by one number."""
    return State(*[{"mark": torch.tensor(float(mark))}] * 3)


def record(mark: int) -> RunRecord:
    policy = PolicySpec(
        action_dim=1,
        cameras={"agentview_image": (84, 84, 3)},
        low_dim={},
        preprocess={"agentview_image": {}},
        encoder_files={"agentview_image": "encoder.safetensors"},
    )
    return RunRecord(kind="train", config={"mark": mark}, policy=policy, data=DataRecord(), order={})


def write(out: Path, mark: int, *, resume: bool = False, overwrite: bool = False, steps: int = 1) -> None:
    """What training does with the folder: start a run, unless it is resumed, and save checkpoints."""
    with run_folder(out, resume=resume, overwrite=overwrite) as folder:
        if not resume or folder.unsaved:
            folder.start(record(mark), {"encoder.safetensors": ENCODER})
        checkpoints = CheckpointFolder(folder.path, 1, folder.saved)
        for step in range(1, steps + 1):
            (folder.path / "metrics.csv").write_text(f"{mark}")
            checkpoints.save(step, state(mark), {}, {}, None)


def mark_of(out: Path) -> int:
    """The run at its place, found whole."""
    saved = read_checkpoint(find_checkpoint(out, latest=True)[1])
    mark = int(read_record(out).config["mark"])
    assert saved.state.model["mark"] == mark
    assert (out / "encoder.safetensors").is_file()
    return mark


def killed_within(work: Callable[[], None], call: int) -> bool:
    """Does the work in a process that is killed before its ``call``-th change of names; False if it ended before."""
    child = os.fork()
    if child == 0:
        left = [call]

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                if left[0] == 0:
                    os._exit(9)
                left[0] -= 1
                return real(*args, **options)

            return call

        try:
            for name in CALLS:
                setattr(os, name, counted(getattr(os, name)))
            run_folder_module.exchange = counted(run_folder_module.exchange)  # type: ignore[assignment]
            work()
        except BaseException:
            os._exit(2)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


def kills(work: Callable[[], None], reset: Callable[[], None]) -> Any:
    """Yields after each of the kills that there can be."""
    call = 0
    reset()
    while killed_within(work, call):
        yield call
        call += 1
        reset()
    assert call > 10


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill loses nothing that was handed to the system, so these tests need not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def emptied(folder: Path) -> None:
    if folder.exists():
        files.remove(folder)
    folder.mkdir()


@FORKS
@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize("again", [{}, {"resume": True}, {"overwrite": True}])
def test_a_run_killed_anywhere_at_its_start_can_be_started_again(again: dict[str, bool], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for _ in kills(lambda: write(runs / "lift", 1), lambda: emptied(runs)):
        saved = (runs / "lift").is_dir() and read_index(runs / "lift").latest is not None
        if saved and not again:
            with pytest.raises(CheckpointError, match="give --resume"):
                write(runs / "lift", 2)
        elif again == {"resume": True} and not (runs / "lift/unfinished.json").exists():
            if saved:
                write(runs / "lift", 1, **again)
            else:
                with pytest.raises(CheckpointError, match="no run to resume"):
                    write(runs / "lift", 2, **again)
                write(runs / "lift", 2)
        else:
            write(runs / "lift", 1 if saved and "resume" in again else 2, **again)
        assert mark_of(runs / "lift") in ((1, 2) if saved else (2,))
        assert [path.name for path in runs.iterdir() if path.name != ".lift.lock"] == ["lift"]


@FORKS
@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize("swaps", [True, False])
def test_a_kill_while_a_run_is_replaced_leaves_the_old_or_the_new_one(
    swaps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    if not swaps:
        monkeypatch.setattr(run_folder_module, "exchange", lambda one, other: False)

    def old_run() -> None:
        emptied(runs)
        write(runs / "lift", 1)
        for file in ("rollouts/seed_0.json", "report.html", "tensorboard/events", "notes.txt", "checkpoints/mine/a"):
            (runs / "lift" / file).parent.mkdir(exist_ok=True)
            (runs / "lift" / file).write_text("old")

    found = set()
    for _ in kills(lambda: write(runs / "lift", 2, overwrite=True), old_run):
        if swaps or (runs / "lift").exists():
            found.add(mark_of(runs / "lift"))
        write(runs / "lift", 3, overwrite=True)
        assert mark_of(runs / "lift") == 3
        assert [path.name for path in runs.iterdir() if path.name != ".lift.lock"] == ["lift"]
        kept = {str(path.relative_to(runs / "lift")) for path in (runs / "lift").rglob("*") if path.is_file()}
        assert {"notes.txt", "checkpoints/mine/a"} <= kept
        assert not {"rollouts/seed_0.json", "report.html", "tensorboard/events", "unfinished.json"} & kept
    assert found == {1, 2}


def test_a_run_that_fails_before_its_first_checkpoint_replaces_nothing(tmp_path: Path) -> None:
    write(tmp_path / "lift", 1)

    def fail() -> None:
        with run_folder(tmp_path / "lift", resume=False, overwrite=True) as folder:
            folder.start(record(2), {})
            assert mark_of(tmp_path / "lift") == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["lift"]
    assert mark_of(tmp_path / "lift") == 1


def test_what_json_cannot_hold_is_one_line(tmp_path: Path) -> None:
    def start() -> None:
        with run_folder(tmp_path / "lift", resume=False, overwrite=False) as folder:
            folder.start(replace(record(1), order={"views": float("nan")}), {})

    with pytest.raises(CheckpointError, match=r"cannot write the run folder .*JSON"):
        start()


def test_what_a_run_begins_with_replaces_nothing(tmp_path: Path) -> None:
    write(tmp_path / "lift", 1)
    with run_folder(tmp_path / "lift", resume=False, overwrite=True) as folder:
        folder.start(record(2), {"encoder.safetensors": ENCODER})
        checkpoints = CheckpointFolder(folder.path, 1, folder.saved)
        for step, there in ((0, 1), (1, 2)):
            assert checkpoints.save(step, state(2), {}, {}, None).is_dir()
            assert mark_of(tmp_path / "lift") == there


def test_folders_that_only_look_like_ours_are_left_alone(tmp_path: Path) -> None:
    for name in (".lift.0123abcd.run", ".lift.old", "lift.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
    (tmp_path / ".lift.0123abcd.run/unfinished.json").write_text('{"state": "unfinished", "run": "lift"}')
    write(tmp_path / "lift", 1)
    write(tmp_path / "lift", 2, overwrite=True)
    assert len(list(tmp_path.glob("*/thesis.txt"))) == 3


@pytest.mark.parametrize("options", [{}, {"overwrite": True}])
def test_a_folder_with_somebody_elses_run_json_is_left_alone(options: dict[str, bool], tmp_path: Path) -> None:
    (tmp_path / "mine/checkpoints").mkdir(parents=True)
    (tmp_path / "mine/run.json").write_text('{"name": "my own tool"}')
    with pytest.raises(CheckpointError, match="is not a run"):
        write(tmp_path / "mine", 1, **options)
    assert (tmp_path / "mine/checkpoints").is_dir()


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
def test_a_second_writer_is_refused_while_the_first_one_lives(options: dict[str, bool], tmp_path: Path) -> None:
    write(tmp_path / "lift", 1)
    (tmp_path / "link").symlink_to(tmp_path / "lift")
    with run_folder(tmp_path / "lift", resume=True, overwrite=False):
        for path in (tmp_path / "lift", tmp_path / "link"):
            with pytest.raises(RunLockedError, match=f"process {os.getpid()}"):
                write(path, 2, **options)
    write(tmp_path / "link", 2, overwrite=True)
    assert mark_of(tmp_path / "lift") == 2
    assert (tmp_path / "link").is_symlink()


def test_training_holds_the_lock_of_its_run(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: PolicyLearner, batch: Batch, number: int) -> torch.Tensor:
        raise ZeroDivisionError if locked(tmp_path / "run") else AssertionError

    monkeypatch.setattr(PolicyLearner, "step", step)
    with pytest.raises(ZeroDivisionError):
        train(config(tmp_path / "run", cache), progress=False)
    assert not locked(tmp_path / "run")


def locked(run: Path) -> bool:
    try:
        with writer_lock(run, RunLockedError):
            return False
    except RunLockedError:
        return True


def test_a_failed_training_over_an_old_run_leaves_that_and_a_finished_one_leaves_nothing_of_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(tmp_path / "run", cache, steps=2)
    train(asked, progress=False)
    for file in ("rollouts/seed_0_20.json", "report.html"):
        (tmp_path / "run" / file).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / file).write_text("old")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with monkeypatch.context() as patch:
        patch.setattr(PolicyLearner, "step", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
        with pytest.raises(torch.OutOfMemoryError):
            train(replace(asked, overwrite=True, seed=5), progress=False)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    result = train(replace(asked, overwrite=True, seed=5), progress=False)
    assert read_record(tmp_path / "run").config["seed"] == 5
    assert not (tmp_path / "run/rollouts").exists()
    assert not (tmp_path / "run/report.html").exists()
    assert len(read_metrics(tmp_path / "run")) == 3
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 1
    assert result.checkpoint.is_dir()
    load_policy(tmp_path / "run")


def test_resuming_a_run_that_saved_nothing_begins_it_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(tmp_path / "run", cache, steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(PolicyLearner, "step", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
        with pytest.raises(torch.OutOfMemoryError):
            train(asked, progress=False)
    with pytest.raises(CheckpointError, match=r"no checkpoint yet; .* start its command again"):
        load_policy(tmp_path / "run")
    train(replace(asked, resume=True), progress=False)
    assert inspect_run(tmp_path / "run").step == 2


def test_only_checkpoints_that_the_index_records_are_removed(tmp_path: Path) -> None:
    write(tmp_path / "lift", 1, steps=3)
    folder = tmp_path / "lift/checkpoints"
    for name in ("step_0000003_for_paper", "step_0000001", "step_0000002", ".mine"):
        (folder / name).mkdir()
        (folder / name / "thesis.txt").write_text("years of work")
    write(tmp_path / "lift", 1, resume=True, steps=4)
    assert len(list(folder.glob("*/thesis.txt"))) == 4
    assert read_index(tmp_path / "lift").made == (find_checkpoint(tmp_path / "lift")[1].name,)


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", refused)
        with pytest.raises(CheckpointError, match="permission denied"):
            write(tmp_path / "runs/lift", 1)
    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(CheckpointError, match="permission denied"):
        write(tmp_path / "lift", 1)


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    write(tmp_path / "lift", 1)
    assert "without locks" in caplog.text
    assert mark_of(tmp_path / "lift") == 1


def test_a_run_that_cannot_take_its_place_is_one_line_and_the_old_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "lift", 1)

    def busy(*args: Any) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(run_folder_module, "exchange", lambda one, other: False)
        patch.setattr(os, "rename", busy)
        with pytest.raises(CheckpointError, match="busy"):
            write(tmp_path / "lift", 2, overwrite=True)
    assert mark_of(tmp_path / "lift") == 1
    write(tmp_path / "lift", 3, overwrite=True)
    assert mark_of(tmp_path / "lift") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lift"]
