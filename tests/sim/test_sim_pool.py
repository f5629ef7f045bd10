"""Units made in this process and in others. The simulator is a function that takes no time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cache_pipeline.errors import ConfigError
from cache_pipeline.sim.pool import WorkerDiedError, make_units


class Numbered(NamedTuple):
    """A unit."""

    number: int

    def __str__(self) -> str:
        return f"unit {self.number}"


class Squares(NamedTuple):
    """Work that writes the number of its process for each unit, and fails or dies at one of them."""

    folder: Path
    fails: int | None = None
    dies: int | None = None
    seconds: float = 0.0

    @contextmanager
    def open(self) -> Iterator[Callable[[Numbered], int]]:
        yield self.square

    def square(self, unit: Numbered) -> int:
        (self.folder / str(unit.number)).write_text(str(os.getpid()))
        time.sleep(self.seconds)
        if unit.number == self.fails:
            raise ConfigError("the task has no camera 'x'")
        if unit.number == self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return unit.number**2


class Counted:
    """The units 0 … count - 1, and their results."""

    def __init__(self, count: int) -> None:
        self.left = [Numbered(number) for number in range(count)]
        self.results: dict[int, int] = {}

    def next(self) -> Numbered | None:
        return self.left.pop(0) if self.left else None

    def done(self, unit: Numbered, result: int) -> None:
        self.results[unit.number] = result


@pytest.mark.parametrize("workers", [1, 2])
def test_every_unit_is_made_once(tmp_path: Path, workers: int) -> None:
    units = Counted(7)
    make_units(Squares(tmp_path), units, workers)
    assert units.results == {number: number**2 for number in range(7)}
    processes = {path.read_text() for path in tmp_path.iterdir()}
    assert processes == {str(os.getpid())} if workers == 1 else str(os.getpid()) not in processes


def test_no_more_processes_start_than_there_are_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *rest, **options: started.append(0) or real(*rest, **options))
    make_units(Squares(tmp_path, seconds=0.2), Counted(2), 5)
    assert len(started) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_unit_is_raised_as_it_is(tmp_path: Path, workers: int) -> None:
    with pytest.raises(ConfigError, match="no camera 'x'"):
        make_units(Squares(tmp_path, fails=2), Counted(5), workers)


def test_a_worker_that_dies_is_one_line_after_the_results_of_the_others(tmp_path: Path) -> None:
    units = Counted(6)
    with pytest.raises(
        WorkerDiedError, match=r"^a worker process was killed.* at unit 3; what is finished is kept: run"
    ):
        make_units(Squares(tmp_path, dies=3, seconds=0.05), units, 2)
    assert len(units.results) >= 2


# Ctrl-C works wherever the tests were started.
PARENT = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
from test_sim_pool import Counted, Squares
from cache_pipeline.sim.pool import make_units
make_units(Squares(Path(sys.argv[1]), seconds=60.0), Counted(2), 2)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path: Path, end: signal.Signals) -> None:
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    workers = set()
    while len(workers) < 2:
        assert parent.poll() is None
        workers = {path.read_text() for path in tmp_path.iterdir()} - {""}
        time.sleep(0.05)
    if end == signal.SIGINT:
        os.killpg(parent.pid, end)  # Ctrl-C reaches the workers too
    else:
        parent.send_signal(end)
    said = parent.communicate()[1].decode()
    assert said.count("Traceback") == (end == signal.SIGINT), "a worker has a traceback of its own"
    deadline = time.monotonic() + 10
    while any(_lives(int(worker)) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _lives(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
