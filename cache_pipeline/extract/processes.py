"""Runs jobs in several processes of this machine, one per device.

The parent hands out jobs one by one through pipes and shows the progress. A worker that dies is replaced, and its jobs
go to the others. A worker ends itself as soon as its pipe is closed, so none outlives its parent.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from cache_pipeline.errors import CachePipelineError, UnitsFailedError
from cache_pipeline.extract.lifeline import WorkerProcess, parent_connection
from cache_pipeline.extract.outstanding import Outstanding
from cache_pipeline.extract.task import Task
from cache_pipeline.extract.units import Job
from cache_pipeline.extract.worker import Ran
from cache_pipeline.isolation import end_child, how_it_ended
from cache_pipeline.memory import retained_memory
from cache_pipeline.text import shortened

logger = logging.getLogger("cache_pipeline")

AHEAD = 2
"""Jobs that a worker has at a time: one is read while the other is encoded."""
DEATHS = 3
"""Times that a worker may die without having finished a job in between; then it is not replaced."""


class WorkerDiedError(RuntimeError):
    """The process of a worker ended while it had the job."""


class Places(NamedTuple):
    """Where workers run: the device of each, the CPU threads of each, and the lock that they share, if any."""

    devices: Sequence[str]
    threads: int
    lock: int | None


def run_in_processes(task: Task, jobs: Sequence[Job], advance: Callable[[int], None], places: Places) -> Ran:
    """Makes the units of all jobs.

    Args:
        task: the cache.
        jobs: what to make.
        advance: called with the number of encoded images.
        places: where.

    Raises:
        UnitsFailedError: units could not be made; all others are done.
    """
    pool = _Pool(task, Outstanding(jobs), advance)
    try:
        return pool.run(places)
    finally:
        pool.end()


class _Process:
    """One worker as its parent sees it.

    Attributes:
        jobs: what it has at the moment.
        images: encoded images of these jobs.
        deaths: how often it died since it last finished a job.
    """

    def __init__(self, number: int, places: Places, task: Task) -> None:
        self._device = places.devices[number]
        self.name = f"worker {number + 1} on {self._device}"
        self._threads, self._lock, self._task = places.threads, places.lock, task
        self.deaths = 0
        self.start()

    def start(self) -> None:
        """Starts the process, again if it has died."""
        self.jobs: list[Job] = []
        self.images, self.ended = 0, False
        threads, lock = {"OMP_NUM_THREADS": str(self._threads)}, [] if self._lock is None else [self._lock]
        self._process = WorkerProcess("cache_pipeline.extract.processes", threads, lock)
        self.connection = self._process.connection
        with suppress(OSError):  # it has died already, which the next look at the pipe shows
            self.connection.send((self._task, self._device, self._threads, logger.getEffectiveLevel()))

    def give(self, job: Job) -> None:
        self.jobs.append(job)
        with suppress(OSError):
            self.connection.send(job)

    def let_end(self) -> None:
        with suppress(OSError):
            self.connection.send(None)

    def end(self) -> int:
        """Ends the process and returns its exit code."""
        return self._process.end()


class _Pool:
    def __init__(self, task: Task, outstanding: Outstanding, advance: Callable[[int], None]) -> None:
        self._task, self._outstanding, self._advance = task, outstanding, advance
        self._workers: list[_Process] = []
        self._ran = Ran(0.0, 0.0, 0.0, task.manifest.batch_size)

    def run(self, places: Places) -> Ran:
        for number in range(min(len(places.devices), len(self._outstanding))):
            self._workers.append(_Process(number, places, self._task))
        while self._outstanding or any(worker.jobs for worker in self._workers):
            for worker in self._workers:
                if not worker.ended:
                    self._fill(worker)
            self._listen()
        for worker in self._workers:
            worker.let_end()
        while not all(worker.ended for worker in self._workers):
            self._listen()
        self._outstanding.check()
        return self._ran

    def end(self) -> None:
        """Ends all workers."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.end()

    def _fill(self, worker: _Process) -> None:
        while len(worker.jobs) < AHEAD and not any(map(self._outstanding.is_suspect, worker.jobs)):
            job = self._outstanding.take(alone=not worker.jobs)
            if job is None:
                return
            worker.give(job)

    def _listen(self) -> None:
        open_ones = {worker.connection: worker for worker in self._workers if not worker.ended}
        for connection in wait(list(open_ones)):
            worker = open_ones[connection]  # type: ignore[index]
            try:
                kind, value = worker.connection.recv()
            except (EOFError, OSError):
                self._died(worker)
            else:
                getattr(self, f"_on_{kind}")(worker, value)

    def _on_images(self, worker: _Process, count: int) -> None:
        worker.images += count
        self._advance(count)

    def _on_done(self, worker: _Process, job: tuple[str, int]) -> None:
        done = next((own for own in worker.jobs if (own.camera, own.block) == job), None)
        if done is not None:
            worker.jobs.remove(done)
            worker.images = max(0, worker.images - done.rows * len(done.views))
        worker.deaths = 0

    def _on_failed(self, worker: _Process, value: tuple[tuple[str, int], Exception]) -> None:
        (camera, block), error = value
        for job in [own for own in worker.jobs if (own.camera, own.block) == (camera, block)]:
            worker.jobs.remove(job)
            logger.warning("%s: %s failed (%s); it is tried again later", worker.name, job.name, shortened(error, 300))
            self._outstanding.failed(job, error)

    def _on_said(self, worker: _Process, value: tuple[int, str]) -> None:
        level, text = value
        logger.log(level, "%s: %s", worker.name, text)

    def _on_broken(self, worker: _Process, error: Exception) -> None:
        raise error

    def _on_ended(self, worker: _Process, ran: Ran) -> None:
        worker.ended = True
        sums = [ours + theirs for ours, theirs in zip(self._ran[:3], ran[:3], strict=True)]
        self._ran = Ran(sums[0], sums[1], sums[2], min(self._ran.batch_size, ran.batch_size))

    def _died(self, worker: _Process) -> None:
        """Replaces a worker that has died; its jobs become suspects."""
        how = how_it_ended(worker.end())
        cause = WorkerDiedError(f"the process that made it {how}")
        worker.deaths += 1
        self._advance(-worker.images)
        worker.jobs, jobs = [], worker.jobs
        logger.warning("%s %s; its %d jobs are made again", worker.name, how, len(jobs))
        for job in jobs:
            self._outstanding.failed(job, cause)
        if not self._outstanding:
            worker.ended = True  # the others have the last jobs, or all are done
            return
        if worker.deaths <= DEATHS:
            worker.start()
            return
        self._workers.remove(worker)
        if not self._workers and self._outstanding:
            self._outstanding.check()
            raise UnitsFailedError(
                f"{worker.name} {how}, {worker.deaths} times without finishing a unit, and no worker is left; finished "
                "units are kept; give fewer --workers or a smaller --batch-size, and run the command again"
            ) from cause


class _Remote:
    """The report of a worker, sent through its pipe; also a handler of its log."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()

    def send(self, kind: str, value: object) -> None:
        with self._lock:
            self._connection.send((kind, value))

    def advance(self, images: int) -> None:
        self.send("images", images)

    def done(self, job: Job) -> None:
        self.send("done", (job.camera, job.block))

    def failed(self, job: Job, error: Exception) -> None:
        """Goes on after an error of ours, which concerns the job; another one may have spoilt the process."""
        self.send("failed", ((job.camera, job.block), error))
        if not isinstance(error, CachePipelineError | OSError):
            os._exit(1)


class _Log(logging.Handler):
    def __init__(self, remote: _Remote) -> None:
        super().__init__()
        self._remote = remote

    def emit(self, record: logging.LogRecord) -> None:
        self._remote.send("said", (record.levelno, record.getMessage()))


def serve() -> None:
    """The worker: makes the units of the jobs that come through the pipe, until None comes or the pipe is closed."""
    connection = parent_connection()
    remote = _Remote(connection)
    try:
        task, device, threads, level = connection.recv()
        inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        threading.Thread(target=_receive, args=(connection, inbox), daemon=True).start()
        logger.handlers[:], logger.propagate = [_Log(remote)], False
        logger.setLevel(level)
        remote.send("ended", _run(task, device, threads, remote, iter(inbox.get, None)))
    except (EOFError, ConnectionError):
        pass
    except Exception as error:
        with suppress(OSError):
            remote.send("broken", error)
    end_child()
    os._exit(0)


def _run(task: Task, device: str, threads: int, remote: _Remote, jobs: Iterator[Job | None]) -> Ran:
    import torch

    torch.set_num_threads(threads)
    with retained_memory():
        return task.worker(device, remote).run(job for job in jobs if job is not None)


def _receive(connection: Connection, inbox: queue.SimpleQueue[Any]) -> None:
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        os._exit(1)  # the parent has ended
