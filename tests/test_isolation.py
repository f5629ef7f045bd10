"""Calls in a child process: results, errors, crashes, endless loops, threads and forks."""

import os
import pickle
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import test_isolation  # by its own name, under which the child imports it

from cache_pipeline import isolation
from cache_pipeline.errors import DatasetError
from cache_pipeline.isolation import IsolatedCrashError, isolated, isolated_when_free, progress

noted: list[str] = []


@pytest.fixture(autouse=True)
def new_child():
    isolation.end_child()
    yield
    isolation.end_child()


def spin(seconds: float, every: float) -> str:
    """Uses CPU time in C code, which Python cannot interrupt, and reports progress now and then."""
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    end = time.process_time() + seconds
    reported = time.process_time()
    while time.process_time() < end:
        sum(range(100_000))
        if time.process_time() - reported > every:
            progress()
            reported = time.process_time()
    return "done"


def fail() -> None:
    raise DatasetError("what, where, what next")


class OddError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def fail_oddly() -> None:
    raise OddError(1, 2)


def note(text: str) -> None:
    noted.append(text)


def notes() -> list[str]:
    return noted


def crash_if(path: str) -> str:
    if Path(path).exists():
        Path(path).unlink()
        os.abort()
    return "whole"


def in_fork(parents_child: int) -> bool:
    return isolated(os.getpid) not in (parents_child, os.getpid())


def limit(seconds: float) -> None:
    isolation.CPU_SECONDS = seconds


def test_results_come_from_another_process_with_arrays_that_may_be_written():
    values = np.arange(1_000_000, dtype=np.float32).reshape(1000, 1000)
    answer = isolated(np.add, values, 1)
    answer[0, 0] = 7
    assert np.array_equal(answer[1:], values[1:] + 1)
    assert isolated(os.getpid) == isolated(os.getpid) != os.getpid()


def test_errors_keep_their_type_and_message():
    with pytest.raises(DatasetError, match="what, where, what next"):
        isolated(test_isolation.fail)
    with pytest.raises(RuntimeError, match="OddError: 1 and 2"):  # cannot be pickled
        isolated(test_isolation.fail_oddly)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
def test_a_crash_is_an_error_and_the_next_call_works(number):
    reason = "killed" if number == signal.SIGKILL else number.name
    with pytest.raises(IsolatedCrashError, match=reason):
        isolated(signal.raise_signal, number)
    assert isolated(abs, -1) == 1


def test_a_call_without_progress_ends_and_one_with_progress_may_take_longer():
    isolated(test_isolation.limit, 0.3)
    assert isolated(test_isolation.spin, 1.0, 0.1) == "done"
    with pytest.raises(IsolatedCrashError, match="CPU time"):
        isolated(test_isolation.spin, 60.0, 60.0)


def test_waiting_does_not_count():
    isolated(test_isolation.limit, 0.2)
    isolated(time.sleep, 0.5)


def test_signals_for_the_parent_do_not_end_the_child():
    child = isolated(os.getpid)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(child, number)
    assert isolated(os.getpid) == child


def test_the_child_ends_with_its_parent(tmp_path):
    code = (
        "import os; from cache_pipeline.isolation import isolated; print(isolated(os.getpid), flush=True); os._exit(9)"
    )
    import subprocess

    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    child = int(shown.stdout)
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the child lives on")


def test_relative_paths_are_those_of_this_process(tmp_path, monkeypatch):
    isolated(abs, -1)
    monkeypatch.chdir(tmp_path)
    assert Path(isolated(os.getcwd)).samefile(tmp_path)


def test_threads_share_one_child_and_survive_a_crash(tmp_path):
    (tmp_path / "crash").touch()
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(isolated, test_isolation.crash_if, str(tmp_path / "crash")) for _ in range(40)]
        errors = [call.exception() for call in calls]
    assert [type(error) for error in errors if error] == [IsolatedCrashError]


def test_a_fork_has_a_child_of_its_own():
    child = isolated(os.getpid)
    with get_context("fork").Pool(1) as pool:
        assert pool.apply_async(in_fork, (child,)).get(timeout=60)
    assert isolated(os.getpid) == child


def test_calls_when_free_are_made_in_order_and_never_block():
    isolated_when_free(test_isolation.note, "without a child, nothing is called")
    isolated(abs, -1)
    slow = threading.Thread(target=isolated, args=(time.sleep, 0.5))
    slow.start()
    time.sleep(0.1)
    started = time.monotonic()
    isolated_when_free(test_isolation.note, "first")
    isolated_when_free(test_isolation.note, "second")
    assert time.monotonic() - started < 0.2
    slow.join()
    assert isolated(test_isolation.notes) == ["first", "second"]


def test_an_interrupt_ends_the_child_so_that_replies_stay_in_step(monkeypatch):
    isolated(abs, -1)
    real = isolation._receive

    def interrupted(source):
        raise KeyboardInterrupt

    monkeypatch.setattr(isolation, "_receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        isolated(abs, -2)
    monkeypatch.setattr(isolation, "_receive", real)
    assert isolated(abs, -3) == 3


def test_crash_errors_can_be_pickled():
    assert str(pickle.loads(pickle.dumps(IsolatedCrashError("HDF5 crashed")))) == "HDF5 crashed"
