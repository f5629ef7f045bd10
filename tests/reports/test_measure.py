import os
import time
from functools import partial

import pytest

from cache_pipeline.errors import CachePipelineError, DatasetError
from cache_pipeline.reports.bench import measure
from cache_pipeline.reports.bench.measure import MIN_ROUNDS, side_by_side


def rests(folder, seconds):
    (folder / str(os.getpid())).touch()
    while True:
        time.sleep(seconds)
        yield 10


def tells(turns, name):
    for number in range(100):
        time.sleep(0.2 * (number > 0))
        with turns.open("a") as file:
            file.write(name)
        yield 1


def fails(error, after):
    for _ in range(after):
        yield 1
    raise error


def dies():
    yield 1
    os._exit(7)


def test_contenders_run_in_processes_of_their_own_and_rates_are_items_per_second(tmp_path):
    rates = side_by_side({"slow": partial(rests, tmp_path, 0.1), "fast": partial(rests, tmp_path, 0.02)}, 0.0)
    processes = {int(path.name) for path in tmp_path.iterdir()}
    assert len(processes) == 2
    assert os.getpid() not in processes
    assert 0 < rates["slow"] <= 100
    assert rates["slow"] < rates["fast"] <= 500


def test_contenders_take_turns_after_some_uncounted_work_each(tmp_path):
    turns = tmp_path / "turns"
    rates = side_by_side({"a": partial(tells, turns, "a"), "b": partial(tells, turns, "b")}, 0.0)
    assert turns.read_text() == "ab" * (1 + MIN_ROUNDS)
    assert all(rate <= 5 for rate in rates.values()), "the first piece, done at once, has been counted"


@pytest.mark.parametrize("after", [0, 1, MIN_ROUNDS])
def test_an_error_of_a_contender_is_raised_by_the_caller(after):
    with pytest.raises(CachePipelineError, match="no demos there"):
        side_by_side({"one": partial(fails, DatasetError("no demos there"), after)}, 0.0)
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*KeyError: 'key'"):
        side_by_side({"one": partial(fails, KeyError("key"), after)}, 0.0)


def test_a_contender_that_dies_raises_an_error_with_its_name():
    with pytest.raises(RuntimeError, match=r"bench: one ended with exit code 7"):
        side_by_side({"one": dies}, 0.0)


def sleeps_and_fails(folder):
    (folder / str(os.getpid())).touch()
    time.sleep(0.5)
    raise DatasetError("no demos there")
    yield


def test_an_interrupt_while_a_contender_prepares_ends_its_process_without_a_word(tmp_path, monkeypatch, capfd):
    def interrupted(runner):
        while not list(tmp_path.iterdir()):
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(measure._Runner, "_answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        side_by_side({"one": partial(sleeps_and_fails, tmp_path)}, 0.0)
    (process,) = (int(path.name) for path in tmp_path.iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    assert capfd.readouterr().err == ""
