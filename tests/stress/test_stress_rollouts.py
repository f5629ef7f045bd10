"""Long tests of rollouts in robosuite: `uv run pytest -m stress tests/stress/test_stress_rollouts.py -s`."""

import json
import os
import sys
import time
from pathlib import Path

import h5py
import pytest

from cache_pipeline.sim.acting import on_fast_path
from cache_pipeline.sim.config import RolloutConfig
from cache_pipeline.sim.environment import Environment
from cache_pipeline.sim.rollout import open_rollouts

sys.path.insert(0, str(Path(__file__).parents[1] / "sim"))
from policies import policy_of
from simulations import skip_without_simulator

pytestmark = [pytest.mark.stress, pytest.mark.sim, pytest.mark.timeout(7200), pytest.mark.filterwarnings("default")]

SAMPLE = Path(__file__).parents[2] / "data" / "lift_sample.hdf5"
RESETS, MOST_MB = int(os.environ.get("STRESS_RESETS", "500")), 200
EPISODES, STEPS = int(os.environ.get("STRESS_EPISODES", "12")), 60
CAMERAS = ("agentview_image", "robot0_eye_in_hand_image")


@pytest.fixture(scope="module")
def recorded():
    skip_without_simulator()
    with h5py.File(SAMPLE) as file:
        return {key: json.loads(file["data"].attrs[key]) for key in ("env_args", "render_flags")}


def policy(recorded, size, net=None):
    cameras, low_dim = dict.fromkeys(CAMERAS, (size, size)), {"robot0_eef_pos": (3,), "object": (10,)}
    made = on_fast_path(policy_of("flow", cameras=cameras, low_dim=low_dim, dims=7, net=net))
    made.env_args, made.render_flags = recorded["env_args"], recorded["render_flags"]
    return made


def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_stays_flat_over_500_resets(recorded):
    config = RolloutConfig(run=Path("none"), episodes=RESETS // 10, horizon=2, device="cpu")
    with open_rollouts(config, policy(recorded, 24), "cpu") as run:
        run()
        before, figures = resident_mb(), []
        for _ in range(10):
            run()
            figures.append(resident_mb() - before)
    print(f"growth in MB after each {RESETS // 10} resets: {', '.join(f'{value:.1f}' for value in figures)}")
    assert figures[-1] < MOST_MB


def test_two_processes_are_at_least_1_6_times_as_fast_as_one(recorded):
    """Needs two free cores; only episodes are timed, not the start of the simulator."""
    acting, seconds = policy(recorded, 84, "resnet18"), {}
    steps = {}
    for workers in (1, 2):
        config = RolloutConfig(run=Path("none"), episodes=EPISODES, horizon=STEPS, workers=workers, device="cpu")
        with open_rollouts(config, acting, "cpu") as run:
            run()
            started = time.perf_counter()
            steps[workers] = [episode.steps for episode in run().records]
            seconds[workers] = time.perf_counter() - started
    rates = {workers: sum(steps[workers]) / value for workers, value in seconds.items()}
    print(f"steps/s with 1 process {rates[1]:.1f}, with 2 {rates[2]:.1f}: {rates[2] / rates[1]:.2f} times")
    assert steps[1] == steps[2]
    assert rates[2] / rates[1] >= 1.6


def test_a_simulation_alone_keeps_its_memory(recorded):
    with Environment.from_env_args(recorded["env_args"], {}, recorded["render_flags"]) as env:
        for seed in range(20):
            env.reset(seed)
        before = resident_mb()
        for seed in range(RESETS):
            env.reset(seed)
    print(f"growth over {RESETS} resets without images: {resident_mb() - before:.1f} MB")
    assert resident_mb() - before < MOST_MB
