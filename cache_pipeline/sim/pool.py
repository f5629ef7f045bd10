"""Makes units in this process, or in several that each have a simulator of their own.

The parent hands out units one by one through pipes and takes the results. A worker ends itself as soon as its pipe is
closed, so none outlives its parent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from multiprocessing.connection import wait
from typing import Any, Protocol

from cache_pipeline.errors import CachePipelineError
from cache_pipeline.extract.lifeline import WorkerProcess
from cache_pipeline.isolation import how_it_ended
from cache_pipeline.sim.child import RemoteTraceback, serve_jobs

logger = logging.getLogger("cache_pipeline")


class WorkerDiedError(CachePipelineError, RuntimeError):
    """The process of a worker ended while it had a unit."""


class Work(Protocol):
    """Says how units are made. It can be pickled, and so can units and results."""

    def open(self) -> AbstractContextManager[Callable[[Any], Any]]:
        """Builds a simulator; yields the function that makes the result of a unit."""


class Units(Protocol):
    """The units that are left to make."""

    def next(self) -> Any | None:
        """Returns the next unit; None while there is none, which the result of another may change."""

    def done(self, unit: Any, result: Any) -> None:
        """Takes the result of a unit. Units are done in any order."""


def make_units(work: Work, units: Units, workers: int) -> None:
    """Makes units until there is none left.

    Args:
        work: how a unit is made.
        units: what to make.
        workers: number of processes; with one, this process makes the units.

    Raises:
        WorkerDiedError: a worker process was killed or crashed.
        Exception: whatever a unit raises.
    """
    if workers == 1:
        with work.open() as make:
            while (unit := units.next()) is not None:
                units.done(unit, make(unit))
        return
    pool = _Pool(work, units, workers)
    try:
        pool.run()
    finally:
        pool.end()


class _Worker:
    """One process as its parent sees it. ``unit`` is what it makes at the moment."""

    def __init__(self, work: Work, level: int) -> None:
        self.unit: Any | None = None
        self._process = WorkerProcess("cache_pipeline.sim.pool", {})
        self.connection = self._process.connection
        self._send((work, level))

    def give(self, unit: Any) -> None:
        self.unit = unit
        self._send(unit)

    def _send(self, value: Any) -> None:
        with suppress(OSError):  # it has died, which the next look at the pipe shows
            self.connection.send(value)

    def end(self) -> int:
        """Ends the process and returns its exit code."""
        return self._process.end()


class _Pool:
    def __init__(self, work: Work, units: Units, most: int) -> None:
        self._work, self._units, self._most = work, units, most
        self._workers: list[_Worker] = []
        self._level = logger.getEffectiveLevel()

    def run(self) -> None:
        while True:
            while len(self._busy()) < self._most and (unit := self._units.next()) is not None:
                self._free_worker().give(unit)
            busy = self._busy()
            if not busy:
                return
            for connection in wait(list(busy)):
                self._listen(busy[connection])

    def end(self) -> None:
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.end()

    def _busy(self) -> dict[Any, _Worker]:
        return {worker.connection: worker for worker in self._workers if worker.unit is not None}

    def _free_worker(self) -> _Worker:
        """Returns a worker without a unit, a new one if need be."""
        free = next((worker for worker in self._workers if worker.unit is None), None)
        if free is not None:
            return free
        self._workers.append(_Worker(self._work, self._level))
        self._level = logging.ERROR  # the others would repeat the warnings of the first
        return self._workers[-1]

    def _listen(self, worker: _Worker) -> None:
        try:
            kind, value = worker.connection.recv()
        except (EOFError, OSError):
            self._workers.remove(worker)
            raise WorkerDiedError(
                f"a worker process {how_it_ended(worker.end())} at {worker.unit}; what is finished is kept: run the "
                "same command again, with fewer --workers if memory was short"
            ) from None
        if kind == "said":
            logger.log(*value)
        elif kind == "broken":
            error, text = value
            raise error from RemoteTraceback(text)
        else:
            unit, worker.unit = worker.unit, None
            self._units.done(unit, value)


def serve() -> None:
    """The worker: makes the units that come through the pipe."""
    serve_jobs(lambda work: work.open())
