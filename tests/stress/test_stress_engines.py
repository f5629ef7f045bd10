"""Long tests of the engines: `uv run pytest -m stress tests/stress/test_stress_engines.py -s`."""

import logging
import os
import random
import signal
import sys
import threading
import time

import pytest
from cache_fakes import extract, outputs
from killed import CONTEXT

from cache_pipeline.cache.integrity import check_integrity
from cache_pipeline.cache.manifest_store import MANIFEST
from cache_pipeline.extract import processes

pytestmark = [pytest.mark.stress, pytest.mark.timeout(7200), pytest.mark.filterwarnings("default")]

KILLS = int(os.environ.get("STRESS_ENGINE_KILLS", "20"))


def run(out, dataset, options):
    """An extraction in a process of its own."""
    logging.getLogger("cache_pipeline").setLevel(logging.ERROR)
    extract(out, dataset, views=2, **options)


def started(out, dataset, **options):
    process = CONTEXT.Process(target=run, args=(out, dataset, options))
    process.start()
    return process


def seconds_of(make):
    began = time.perf_counter()
    make()
    return time.perf_counter() - began


def units_in(out):
    return len(list(out.glob("ledger/**/*.json")))


def check_whole(out, whole):
    assert outputs(out) == whole
    assert check_integrity(out).ok


def test_a_worker_killed_at_any_moment_changes_no_digest(tmp_path, dataset, whole, monkeypatch):
    workers = []
    start = processes._Process.start

    def kept(self):
        start(self)
        workers.append(self._process._process)

    monkeypatch.setattr(processes._Process, "start", kept)
    seconds = seconds_of(lambda: extract(tmp_path / "timed.zarr", dataset, views=2, workers=2))
    rng, hits = random.Random(0), 0
    for number in range(KILLS):
        out, wait = tmp_path / f"{number}.zarr", rng.uniform(0, seconds)
        workers.clear()
        thread = threading.Thread(target=extract, args=(out, dataset), kwargs={"views": 2, "workers": 2})
        thread.start()
        time.sleep(wait)
        if workers:
            victim = rng.choice(workers)
            hits += victim.poll() is None
            victim.kill()
        thread.join()
        extract(out, dataset, views=2, workers=2)
        check_whole(out, whole)
    print(f"{KILLS} runs, {hits} times a worker was killed while it lived")
    assert hits > 0


@pytest.mark.parametrize("options", [{"workers": 2}, {"part": "1/1"}], ids=["driver", "part"])
def test_a_driver_or_a_part_killed_at_any_moment_changes_no_digest(tmp_path, dataset, whole, options):
    def once(out):
        process = started(out, dataset, **options)
        process.join()
        assert process.exitcode == 0

    once(tmp_path / "first.zarr")  # the fork server starts
    seconds = seconds_of(lambda: once(tmp_path / "timed.zarr"))
    rng, out, finished, advanced, number = random.Random(1), tmp_path / "0.zarr", 0, 0, 0
    for _ in range(KILLS):
        before = units_in(out)
        process = started(out, dataset, **options)
        process.join(rng.uniform(0.3, 1.1) * seconds)
        process.kill()
        process.join()
        advanced += units_in(out) > before
        if (out / MANIFEST).exists():
            finished += 1
            check_whole(out, whole)
            number += 1
            out = tmp_path / f"{number}.zarr"
    extract(out, dataset, views=2)
    check_whole(out, whole)
    print(f"{options}: {KILLS} kills, {advanced} after units were written, {finished} after the end")
    assert advanced > 0


def test_one_of_two_parts_killed_at_any_moment_changes_no_digest(tmp_path, dataset, whole):
    rng, together = random.Random(2), 0
    for number in range(KILLS):
        out = tmp_path / f"{number}.zarr"
        parts = [started(out, dataset, part=f"{part}/2") for part in (1, 2)]
        time.sleep(rng.uniform(0, 1.0))
        together += all(part.is_alive() for part in parts)
        victim = rng.randrange(2)
        parts[victim].kill()
        for part in parts:
            part.join()
        assert parts[1 - victim].exitcode == 0
        again = started(out, dataset, part=f"{victim + 1}/2")
        again.join()
        assert again.exitcode == 0
        check_whole(out, whole)
    print(f"{KILLS} times a part was killed, {together} times while the other ran")
    assert together > 0


@pytest.fixture
def cluster():
    """Two raylets: the head, where the driver runs, has no CPU for actors; the other one has."""
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    ray.init(address=made.address, logging_level=logging.ERROR, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def test_a_raylet_killed_at_any_moment_changes_no_digest(tmp_path, dataset, whole, cluster):
    options = {"views": 2, "engine": "ray", "workers": 2}
    seconds = seconds_of(lambda: extract(tmp_path / "timed.zarr", dataset, **options))
    check_whole(tmp_path / "timed.zarr", whole)
    rng, during, errors = random.Random(3), 0, []

    def attempt(out):
        try:
            extract(out, dataset, **options)
        except Exception as error:  # the next run goes on
            errors.append(error)

    for number in range(KILLS):
        out = tmp_path / f"{number}.zarr"
        thread = threading.Thread(target=attempt, args=(out,))
        thread.start()
        time.sleep(rng.uniform(0, seconds))
        during += thread.is_alive()
        (node,) = cluster.worker_nodes
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=1)
        thread.join()
        extract(out, dataset, **options)
        check_whole(out, whole)
    print(f"{KILLS} raylets killed, {during} during a run; {len(errors)} runs had to be started again")
    assert during > 0


RAY_DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
from cache_fakes import extract
extract(sys.argv[2], sys.argv[3], views=2, engine="ray", workers=2, ray_address=sys.argv[4])
"""


def test_a_ray_driver_killed_at_any_moment_changes_no_digest(tmp_path, dataset, whole, cluster):
    import subprocess

    tests = os.path.dirname(os.path.dirname(__file__))
    rng, cut = random.Random(4), 0

    def driver(out):
        words = [sys.executable, "-c", RAY_DRIVER, tests, str(out), str(dataset), cluster.address]
        return subprocess.Popen(words, stderr=subprocess.DEVNULL)

    seconds = seconds_of(lambda: driver(tmp_path / "timed.zarr").wait())
    for number in range(KILLS):
        out = tmp_path / f"{number}.zarr"
        process = driver(out)
        time.sleep(rng.uniform(0.3, 1) * seconds)
        cut += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        extract(out, dataset, views=2, engine="ray", workers=2)
        check_whole(out, whole)
    print(f"{KILLS} drivers, {cut} killed before their end")
    assert cut > 0
