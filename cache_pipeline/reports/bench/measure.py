"""Timing on a shared machine: contenders take turns, and medians are reported.

Each contender has its own process, so threads, memory and settings of one do not affect another.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from statistics import median
from typing import NamedTuple

from cache_pipeline.errors import CachePipelineError

MIN_ROUNDS = 3
ENDING_S = 10.0

Work = Iterator[float]
"""Each ``next`` does some work and returns the number of finished items."""

Prepare = Callable[[], Work]
"""Prepares a contender in its process."""


class Round(NamedTuple):
    """Work of a contender in one turn."""

    items: float
    seconds: float


def side_by_side(contenders: Mapping[str, Prepare], seconds: float) -> dict[str, float]:
    """Measures items per second of each contender in turns, so that a drift of the machine affects all alike.

    Args:
        contenders: name → a picklable function that prepares the contender's work in its own process. One
            uncounted piece of work warms up.
        seconds: shortest total time of each contender; at least three rounds are run.

    Returns:
        Name → median over rounds.

    Raises:
        CachePipelineError: raised by a contender.
        RuntimeError: a contender failed with another error; contains its traceback.
    """
    rounds: dict[str, list[Round]] = {name: [] for name in contenders}
    with ExitStack() as stack:
        runners = {name: stack.enter_context(_Runner(name, prepare)) for name, prepare in contenders.items()}
        while any(_lacks(done, seconds) for done in rounds.values()):
            for name, runner in runners.items():
                if _lacks(rounds[name], 4 * seconds):
                    rounds[name].append(runner.run())
    return {name: median(one.items / one.seconds for one in done) for name, done in rounds.items()}


def _lacks(rounds: list[Round], seconds: float) -> bool:
    return len(rounds) < MIN_ROUNDS or sum(one.seconds for one in rounds) < seconds


class _Runner:
    """A contender and its process."""

    def __init__(self, name: str, prepare: Prepare) -> None:
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, prepare), name=f"bench {name}")
        self._there = there

    def __enter__(self) -> _Runner:
        self._process.start()
        self._there.close()
        try:
            self._answer()
        except BaseException:  # also an interrupt: a ``with`` statement does not call __exit__ then
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._pipe.close()
        self._process.join(ENDING_S)
        self._process.kill()
        self._process.join()

    def run(self) -> Round:
        """Runs one round; raises the error of the work."""
        self._pipe.send(None)
        answer = self._answer()
        assert isinstance(answer, Round)
        return answer

    def _answer(self) -> Round | None:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join(ENDING_S)
            raise RuntimeError(f"bench: {self._name} ended with exit code {self._process.exitcode}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(pipe: Connection, prepare: Prepare) -> None:
    """Prepares the work, warms up, and works once per message until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(EOFError, BrokenPipeError):  # the caller has ended
        _work(pipe, prepare)


def _work(pipe: Connection, prepare: Prepare) -> None:
    try:
        work = prepare()
        next(work)
        pipe.send(None)
        while True:
            pipe.recv()
            started = time.perf_counter()
            items = next(work)
            pipe.send(Round(items, time.perf_counter() - started))
    except (EOFError, BrokenPipeError):
        raise
    except CachePipelineError as error:
        pipe.send(CachePipelineError(str(error)))
    except Exception:
        pipe.send(RuntimeError(traceback.format_exc()))
