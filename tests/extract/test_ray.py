"""Extraction on a Ray cluster of this machine."""

import logging
import os
import socket
import sys
import time

import pytest
from cache_fakes import CAMERA, OVERFLOWING, SLOW, extract, outputs

from cache_pipeline.cache.integrity import check_integrity
from cache_pipeline.cache.manifest_store import MANIFEST
from cache_pipeline.errors import ConfigError, MissingExtraError, UnitsFailedError
from cache_pipeline.extract import ray_actors

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore:::ray"), pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine, without what the tests do not need."""
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    yield ray
    ray.shutdown()


def test_ray_gives_the_cache_of_one_process(cluster, dataset, out, whole):
    result = extract(out, dataset, views=2, engine="ray", workers=2)
    assert outputs(out) == whole
    assert check_integrity(out).ok
    assert min(result.read_s, result.encode_s, result.write_s) > 0
    assert extract(out, dataset, views=2, engine="ray").units_encoded == 0


def test_a_killed_actor_is_started_again_by_ray(cluster, dataset, out, whole, monkeypatch):
    take, killed = ray_actors._Pool._take, []

    def kill_first(self, *args):
        take(self, *args)
        if not killed:
            killed.append(1)
            cluster.kill(self._actors[0], no_restart=False)

    monkeypatch.setattr(ray_actors._Pool, "_take", kill_first)
    extract(out, dataset, views=2, engine="ray", workers=1)
    assert killed
    assert outputs(out) == whole


def test_a_unit_that_fails_three_times_is_named_and_the_others_are_done(cluster, dataset, out):
    with pytest.raises(
        UnitsFailedError, match=r"features/agentview_image/0/0 could not be made in 3 attempts: .*demo_0"
    ):
        extract(out, dataset, engine="ray", workers=1, encoders=OVERFLOWING, cameras=(CAMERA,))
    assert not (out / MANIFEST).exists()
    assert len(list(out.glob("ledger/frames/**/*.json"))) == 5


def test_an_address_that_does_not_answer_is_one_line(dataset, out):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(
            ConfigError, match=f"no Ray cluster answers at {address} .*; start one with: ray start"
        ) as caught:
            ray_actors.check_answers(address)
    assert time.monotonic() - started < 30
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["head", "head:x", ":1", "head:99999"])
def test_what_is_no_address_is_told(address):
    with pytest.raises(ConfigError, match="is not an address; give HOST:PORT"):
        ray_actors.check_answers(address)


def test_without_the_extra_it_is_named(dataset, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"--engine ray needs Ray; install it with uv sync --extra ray"):
        extract(out, dataset, engine="ray", encoders=SLOW)
