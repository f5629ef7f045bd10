"""Simulations in processes of their own.

The parent sends jobs through a pipe and receives obs. A worker imports the simulator, never the policy. It ends itself
as soon as its pipe is closed, so none outlives its parent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Any

from cache_pipeline.errors import CachePipelineError
from cache_pipeline.extract.lifeline import WorkerProcess
from cache_pipeline.isolation import how_it_ended
from cache_pipeline.sim.child import RemoteTraceback, serve_jobs
from cache_pipeline.sim.simulation import Local, Opening, Play, Played, Reset, perform

logger = logging.getLogger("cache_pipeline")


class WorkerEndedError(CachePipelineError, RuntimeError):
    """The process of a simulation ended while it had a job."""


class Worker:
    """A simulation in a process of its own, as its parent sees it; a context manager.

    Args:
        opening: the simulation to open there.
        keys: the obs to send.
        name: names it in messages.
        says: whether its log is shown; the workers of one command say the same.
    """

    def __init__(self, opening: Opening, keys: tuple[str, ...], name: str, *, says: bool) -> None:
        self._name = name
        # The simulator computes on one core; all together would start many threads each.
        self._process = WorkerProcess("cache_pipeline.sim.workers", {"OMP_NUM_THREADS": "1"})
        self._send(((opening, keys), logger.getEffectiveLevel() if says else logging.CRITICAL))

    def send(self, job: Reset | Play) -> None:
        """Sends a job; its result must be received before the next one."""
        self._send(job)

    def receive(self) -> Played:
        """Waits for the result of the job.

        Raises:
            WorkerEndedError: the process ended. Exception: whatever the simulation raises.
        """
        while True:
            try:
                kind, value = self._process.connection.recv()
            except (EOFError, OSError):
                how = how_it_ended(self._process.end())
                raise WorkerEndedError(
                    f"{self._name} {how}; no result was saved; give fewer --workers, or leave --workers out to see the "
                    "error of the simulator, and run the command again"
                ) from None
            if kind == "done":
                played: Played = value
                return played
            if kind == "said":
                logger.log(*value)
                continue
            error, text = value
            raise error from RemoteTraceback(text)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.end()

    def _send(self, value: object) -> None:
        with suppress(OSError):  # it has ended, which receive says
            self._process.connection.send(value)


@contextmanager
def opened(opening: Opening, keys: tuple[str, ...], workers: int) -> Iterator[list[Any]]:
    """Opens a simulation in this process, or one in each of several processes, and closes them at the end."""
    if workers == 1:
        with opening.open() as simulation:
            yield [Local(simulation, keys)]
        return
    with ExitStack() as stack:
        names = [f"simulation process {number} of {workers}" for number in range(1, workers + 1)]
        yield [stack.enter_context(Worker(opening, keys, name, says=name == names[0])) for name in names]


def serve() -> None:
    """The worker: plays what the parent asks for."""
    serve_jobs(_playing)


@contextmanager
def _playing(setup: tuple[Opening, tuple[str, ...]]) -> Iterator[Callable[[Reset | Play], Played]]:
    opening, keys = setup
    with opening.open() as simulation:
        yield partial(perform, simulation, keys)
