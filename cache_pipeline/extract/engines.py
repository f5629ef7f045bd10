"""Engines run the jobs that are not done: in this process, in several processes of this machine, or on a Ray cluster.

An engine keeps no state of its own. A unit is a whole shard with deterministic bytes, and the ledger alone says which
units are done, so a unit may be made twice and a killed engine leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from cache_pipeline.cache.lock import lock_descriptor
from cache_pipeline.cache.store_protocol import Stamp
from cache_pipeline.encoders.device import resolve_device
from cache_pipeline.extract.config import ExtractConfig
from cache_pipeline.extract.prepare import Prepared
from cache_pipeline.extract.processes import Places, run_in_processes
from cache_pipeline.extract.task import Task
from cache_pipeline.extract.units import Job
from cache_pipeline.extract.worker import Ran, Worker
from cache_pipeline.progress import Progress


def run_jobs(config: ExtractConfig, prepared: Prepared, claim: Stamp | None, progress: bool) -> Ran:
    """Makes the units of all jobs of ``prepared``, on the engine that the options choose.

    Raises:
        CacheError: units could not be made; all others are done.
    """
    work = prepared.work
    if not work.jobs:
        return Ran(0.0, 0.0, 0.0, prepared.manifest.batch_size)
    total = work.images + work.images_reused
    with Progress("encode", total, "images", done=work.images_reused) as bar:
        advance = bar.advance if progress else _ignore
        if config.in_this_process:
            return _run_here(prepared, claim, advance)
        task = task_of(config, prepared, claim)
        if config.engine == "ray":
            from cache_pipeline.extract.ray_actors import run_on_ray

            return run_on_ray(task, work.jobs, advance, config)
        devices = config.devices or (config.device,) * (config.workers or 1)
        names = [str(resolve_device(name)) for name in devices]
        places = Places(names, threads_of_each(len(names)), lock_descriptor(prepared.out))
        return run_in_processes(task, work.jobs, advance, places)


def task_of(config: ExtractConfig, prepared: Prepared, claim: Stamp | None) -> Task:
    """Returns what the workers of other processes need."""
    encoders = {
        camera: (config.encoder_for(camera), config.preprocess_for(camera)) for camera in prepared.manifest.cameras
    }
    return Task(prepared.store.place, claim, prepared.manifest, prepared.dataset, encoders, config.allow_other_device)


def threads_of_each(workers: int) -> int:
    """Returns the number of threads of each worker: all together use the cores that this process would use."""
    return max(1, torch.get_num_threads() // workers)


class _Here:
    """The report of a worker in this process: the first error ends it."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance = advance

    def done(self, job: Job) -> None:
        pass

    def failed(self, job: Job, error: Exception) -> None:
        raise error


def _run_here(prepared: Prepared, claim: Stamp | None, advance: Callable[[int], None]) -> Ran:
    encoders = {camera: encoder.frozen for camera, encoder in prepared.encoders.items()}
    report = _Here(advance)
    worker = Worker(prepared.store, claim, prepared.manifest, prepared.dataset, encoders, report)
    return worker.run(prepared.work.jobs)


def _ignore(count: int) -> None:
    pass
