"""Simulations in processes of their own: the same results, and what is said when one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from policies import SHAPES, policy_of

from cache_pipeline.errors import ConfigError
from cache_pipeline.sim.acting import Actor
from cache_pipeline.sim.config import RolloutConfig
from cache_pipeline.sim.custom import FactoryOpening
from cache_pipeline.sim.rollout import rollout
from cache_pipeline.sim.simulation import Reset
from cache_pipeline.sim.workers import WorkerEndedError, opened

WALK = Path(__file__).with_name("walk.py")


def results(**options: Any) -> list[tuple[int, bool, int]]:
    options = {"env": f"{WALK}:make", "episodes": 7, "device": "cpu", **options}
    result = rollout(RolloutConfig(run=Path("none"), **options), policy=policy_of("flow"), progress=False)
    return [(episode.seed, episode.success, episode.steps) for episode in result.records]


def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    alone = results(video=tmp_path / "one", videos=2)
    assert 0 < sum(success for _, success, _ in alone) < 7
    assert results(workers=2, video=tmp_path / "two", videos=2) == alone
    assert results(workers=9) == alone
    films = [sorted((tmp_path / name).iterdir()) for name in ("one", "two")]
    for one, two in zip(*films, strict=True):
        assert one.name == two.name
        assert one.read_bytes() == two.read_bytes()


def test_an_obs_that_the_environment_lacks_is_one_line_with_those_it_has() -> None:
    for workers in (1, 2):
        with pytest.raises(ConfigError, match=r"lacking has no obs 'pose'.*available: front_image, wrist_image"):
            results(env=f"{WALK}:lacking", workers=workers)


def test_a_process_that_ends_is_one_line_that_says_how() -> None:
    with pytest.raises(
        WorkerEndedError, match=r"simulation process \d of 2 ended with exit code 9; no result was saved"
    ):
        results(env=f"{WALK}:Dying", workers=2)


def test_an_error_of_the_environment_comes_with_the_traceback_of_its_process() -> None:
    with pytest.raises(ZeroDivisionError, match="on fire") as caught:
        results(env=f"{WALK}:Failing", workers=2)
    assert "walk.py" in str(caught.value.__cause__)
    assert "in step" in str(caught.value.__cause__)


def test_a_killed_process_is_named() -> None:
    opening = FactoryOpening(f"{WALK}:make", SHAPES, {"pose": (3,)})
    with opened(opening, ("pose",), 2) as (first, second):
        for worker in (first, second):
            worker.send(Reset(0))
            worker.receive()
        os.kill(second._process.pid, signal.SIGKILL)
        second.send(Reset(1))
        with pytest.raises(WorkerEndedError, match=r"simulation process 2 of 2 was killed.*fewer --workers"):
            second.receive()
        first.send(Reset(1))
        assert first.receive().obs[0]["pose"].shape == (3,)


def test_processes_end_with_their_parent() -> None:
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); "
        "from cache_pipeline.sim.custom import FactoryOpening; from cache_pipeline.sim.workers import opened\n"
        "with opened(FactoryOpening(sys.argv[2], {}, {}), ('pose',), 2) as workers:\n"
        "    print(*(worker._process.pid for worker in workers), flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(WALK.parent), f"{WALK}:make"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == 2
    until = time.monotonic() + 20
    while any(map(lives, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(lives, pids))


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_simulator_alone_is_imported_in_a_worker() -> None:
    code = "import sys, cache_pipeline.sim.workers; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_a_policy_with_one_state_for_all_episodes_needs_one_process() -> None:
    policy: Any = policy_of("mlp")
    policy.start_episode = lambda: None
    assert Actor(policy, "cpu").one_at_a_time
    config = RolloutConfig(run=Path("none"), env=f"{WALK}:make", workers=2, device="cpu")
    with pytest.raises(ConfigError, match="one after another"):
        rollout(config, policy=policy, progress=False)
