"""What a training run says when it is stopped: how far it came, and the command line that goes on."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from fakes import make_dataset
from typer.testing import CliRunner

from cache_pipeline.cli import app
from cache_pipeline.cli.training import resuming_command
from cache_pipeline.runs.summary import inspect_run
from cache_pipeline.training.update.learner import PolicyLearner

RANDOM = ["--no-pretrained-encoder", "--device", "cpu", "--precision", "fp32"]


def run(*args: object) -> Any:
    return CliRunner().invoke(app, ["--quiet", *map(str, args)])


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A train command without its program."""
    dataset = make_dataset(tmp_path / "d.hdf5")
    out = tmp_path / "a run"
    return ["train", "--dataset", str(dataset), *RANDOM, "--batch-size", "4", "--steps", "4", "--out", str(out)]


def stop_in(monkeypatch: pytest.MonkeyPatch, step: int, words: list[str]) -> str:
    """Runs the command, stopped by Ctrl-C within a step; what it says."""
    real = PolicyLearner.step

    def step_and_signal(self: Any, batch: Any, number: int) -> Any:
        if number == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(PolicyLearner, "step", step_and_signal)
        patch.setattr(sys, "argv", ["cli.py", *words])
        result = run(*words)
    assert result.exit_code == 130, result.output
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    return result.stderr.strip()


def test_the_command_that_an_interrupted_run_names_goes_on_with_it(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = stop_in(monkeypatch, 2, words)
    assert said.startswith(
        f"interrupted: saved step 2 of 4 in {tmp_path / 'a run'}; continue with: python cli.py train"
    )
    command = shlex.split(said.split("continue with: ")[1])
    assert stop_in(monkeypatch, 3, command[2:]).endswith(said.split("continue with: ")[1])
    result = run(*command[2:])
    assert result.exit_code == 0, result.output
    assert inspect_run(tmp_path / "a run").step == 4


def test_a_run_that_replaces_another_one_is_resumed_not_replaced_again(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*words).exit_code == 0
    said = stop_in(monkeypatch, 1, [*words, "--overwrite"])
    assert said.endswith(" --resume")
    assert "--overwrite" not in said


@pytest.mark.parametrize(
    ("program", "environment", "start"),
    [
        ("/usr/bin/cache-pipeline", {}, "cache-pipeline train"),
        ("cli.py", {}, "python cli.py train"),
        ("/there/cache_pipeline/__main__.py", {}, "python -m cache_pipeline train"),
        ("cli.py", {"LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"}, "torchrun --nproc-per-node 2 cli.py train"),
        ("cli.py", {"LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "3"}, "torchrun --nnodes 3 --nproc-per-node 2 cli.py"),
    ],
)
def test_the_command_begins_as_the_run_was_started(
    program: str, environment: dict[str, str], start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [program, "train", "--out", "it's"])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert resuming_command().startswith(start)
    assert resuming_command().endswith(""" --out 'it'"'"'s' --resume""")


def test_under_torchrun_only_the_first_process_says_so(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Any, batch: Any, number: int) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(PolicyLearner, "step", interrupted)
    monkeypatch.setenv("RANK", "1")
    result = run(*words)
    assert result.exit_code == 130
    assert result.stderr == ""
