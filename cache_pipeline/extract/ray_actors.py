"""Runs jobs on a Ray cluster: one actor per device, each with a worker.

Ray places the actors, restarts those that die, repeats their calls and finds lost nodes. No state is kept here: after
the loss of the whole cluster the same command goes on with what the ledger lacks.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from cache_pipeline.cache.lock import shared_writing
from cache_pipeline.cache.store import real_store
from cache_pipeline.errors import ConfigError, MissingExtraError, UnitsFailedError, install_command
from cache_pipeline.extract.config import ExtractConfig
from cache_pipeline.extract.outstanding import ATTEMPTS, Outstanding
from cache_pipeline.extract.task import Task
from cache_pipeline.extract.units import Job
from cache_pipeline.extract.worker import Ran

logger = logging.getLogger("cache_pipeline")

AT_ONCE = 4
"""Jobs of one call of an actor: while one is encoded, the next is read."""
RESTARTS = 100
CONNECT_S = 10.0
START_S = 120.0
"""Time for the first actor to be placed; a cluster that has no room for one never places it."""
DEFAULT_PORT = 6379


class _Outcome(NamedTuple):
    """Result of one call of an actor: number of encoded images, failed jobs with their errors, stage times."""

    images: int
    failed: list[tuple[Job, Exception]]
    ran: Ran


class _Report:
    """Collects what a call has made."""

    def __init__(self) -> None:
        self.images = 0
        self.errors: list[tuple[Job, Exception]] = []

    def advance(self, images: int) -> None:
        self.images += images

    def done(self, job: Job) -> None:
        pass

    def failed(self, job: Job, error: Exception) -> None:
        self.errors.append((job, error))


class _Maker:
    """The actor: loads the encoders once, then makes the units of a few jobs per call."""

    def __init__(self, reference: Sequence[Any], device: str, threads: int, shares: bool) -> None:
        import ray
        import torch

        torch.set_num_threads(threads)
        task: Task = ray.get(reference[0])
        self._report = _Report()
        self._worker = task.worker(device, self._report)
        self._lock = ExitStack()
        if shares:  # other writers are kept out as long as this process lives, even without its driver
            self._lock.enter_context(shared_writing(real_store(task.place)))

    def make(self, jobs: Sequence[Job]) -> _Outcome:
        self._report.images, self._report.errors = 0, []
        ran = self._worker.run(jobs)
        return _Outcome(self._report.images, self._report.errors, ran)


def run_on_ray(task: Task, jobs: Sequence[Job], advance: Callable[[int], None], config: ExtractConfig) -> Ran:
    """Makes the units of all jobs on the cluster that the options name.

    Raises:
        MissingExtraError: Ray is not installed.
        ConfigError: the cluster does not answer, or has no room for an actor.
        UnitsFailedError: units could not be made; all others are done.
    """
    from cache_pipeline.encoders.device import resolve_device

    device = resolve_device(config.device).type
    with connected(config.ray_address) as ray:
        outstanding = Outstanding(jobs)
        count = _places(ray, device, config.workers, len(jobs))
        pool = _Pool(ray, task, [(device, _threads(ray, device, count), config.in_parts)] * count)
        ran = pool.run(outstanding, advance)
    outstanding.check()
    return ran


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Yields the module ``ray``, connected to a cluster, or to one that is started on this machine."""
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # else Ray copies the working folder to every node
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError(f"--engine ray needs Ray; install it with {install_command('ray')}") from error
    if ray.is_initialized():
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        check_answers(address)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
            raise ConfigError(f"the Ray cluster at {address or 'this machine'} cannot be used: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def check_answers(address: str) -> None:
    """Raises ConfigError if nothing listens at a Ray address; Ray itself would wait for minutes."""
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"--ray-address {address} is not an address; give HOST:PORT, such as 10.0.0.1:{DEFAULT_PORT}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise ConfigError(
            f"no Ray cluster answers at {address} ({error}); start one with: ray start --head, or leave --ray-address "
            "out for one on this machine"
        ) from error


def _places(ray: Any, device: str, workers: int | None, jobs: int) -> int:
    """Returns the number of actors: as asked, else one per GPU, or one per two CPUs."""
    resources = ray.cluster_resources()
    room = int(resources.get("GPU", 0)) if device == "cuda" else max(1, int(resources.get("CPU", 1)) // 2)
    return max(1, min(workers or room, jobs))


def _threads(ray: Any, device: str, workers: int) -> int:
    """Returns the CPU threads of each actor: together they use all CPUs of the cluster."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)) // workers) if device == "cpu" else 1


class _Pool:
    """The actors, and the calls that they have not answered yet."""

    def __init__(self, ray: Any, task: Task, places: Sequence[tuple[str, int, bool]]) -> None:
        options = {"num_gpus": 1, "num_cpus": 1} if places[0][0] == "cuda" else {"num_cpus": 1}
        made = ray.remote(_Maker).options(max_restarts=RESTARTS, max_task_retries=ATTEMPTS, **options)
        self._ray, self._task = ray, ray.put(task)  # actors that are restarted read it again
        self._actors = [made.remote([self._task], *place) for place in places]
        self._calls: dict[Any, tuple[Any, list[Job]]] = {}
        self._ran = Ran(0.0, 0.0, 0.0, task.manifest.batch_size)

    def run(self, outstanding: Outstanding, advance: Callable[[int], None]) -> Ran:
        for actor in self._actors:
            self._call(actor, outstanding)
        started = False
        while self._calls:
            ready, _ = self._ray.wait(list(self._calls), timeout=None if started else START_S)
            if not ready:
                raise ConfigError(
                    f"the Ray cluster has placed no worker within {START_S:.0f} s; it has "
                    f"{self._ray.available_resources()} free; add nodes, or give fewer --workers or --device cpu"
                )
            started = True
            for call in ready:
                actor, jobs = self._calls.pop(call)
                self._take(call, jobs, outstanding, advance)
                self._call(actor, outstanding)
        return self._ran

    def _call(self, actor: Any, outstanding: Outstanding) -> None:
        jobs: list[Job] = []
        while len(jobs) < AT_ONCE and not any(map(outstanding.is_suspect, jobs)):
            job = outstanding.take(alone=not jobs)
            if job is None:
                break
            jobs.append(job)
        if jobs:
            self._calls[actor.make.remote(jobs)] = actor, jobs

    def _take(self, call: Any, jobs: list[Job], outstanding: Outstanding, advance: Callable[[int], None]) -> None:
        from ray.exceptions import RayActorError, RayError, RayTaskError

        try:
            outcome: _Outcome = self._ray.get(call)
        except RayTaskError as error:
            raise error.cause from error
        except (RayActorError, RayError) as error:
            lost = UnitsFailedError(f"Ray gave up: {' '.join(str(error).split())[:300]}")
            for job in jobs:
                outstanding.failed(job, lost)
            return
        advance(outcome.images)
        sums = [ours + theirs for ours, theirs in zip(self._ran[:3], outcome.ran[:3], strict=True)]
        self._ran = Ran(sums[0], sums[1], sums[2], min(self._ran.batch_size, outcome.ran.batch_size))
        for job, cause in outcome.failed:
            outstanding.failed(job, cause)
