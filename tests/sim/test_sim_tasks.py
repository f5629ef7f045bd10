"""The scripted experts in the real simulator: success, collected files, robomimic's reader, rollouts."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from simulations import skip_without_simulator

from cache_pipeline.sim.collect import CollectConfig, collect, make_env_args, record_demo
from cache_pipeline.sim.environment import Environment
from cache_pipeline.sim.rollout import RolloutConfig, rollout
from cache_pipeline.sim.tasks.registry import TASKS

pytestmark = pytest.mark.sim
SIZE = 16
CAMERA = "agentview_image"
OBJECT_DIM = {"Stack": 23, "PickPlaceCan": 14, "Door": 14, "NutAssemblySquare": 14}
EACH_TASK = pytest.mark.parametrize("name", OBJECT_DIM)
"""Lift is in test_sim_environment."""


@pytest.fixture(scope="module", autouse=True)
def simulator() -> None:
    skip_without_simulator()


@EACH_TASK
def test_the_expert_succeeds_well_within_its_horizon_and_places_differ_between_seeds(name: str, tmp_path: Path) -> None:
    config = CollectConfig(out=tmp_path / "x.hdf5", task=name, cameras=())
    with Environment.from_env_args(make_env_args(config), {}) as env:
        demo = record_demo(env, config, attempt=0)
        places = np.stack([env.reset(seed)["object"] for seed in range(4)])
    assert demo.success
    assert 80 < len(demo.actions) < TASKS[name].horizon / 2
    assert demo.obs["object"].shape == (len(demo.actions), OBJECT_DIM[name])
    assert len(np.unique(places, axis=0)) == 4
    assert np.ptp(places, axis=0).max() > 0.01


class Expert:
    """The scripted expert of a collected file behind a policy's interface."""

    cameras = {}  # noqa: RUF012
    obs_horizon = 1

    def __init__(self, path: Path) -> None:
        with h5py.File(path) as file:
            self.env_args, self.render_flags = (
                json.loads(file["data"].attrs[key]) for key in ("env_args", "render_flags")
            )
            obs = file["data/demo_0/obs"]
            self.low_dim = {key: obs[key].shape[1:] for key in ("robot0_eef_pos", "robot0_eef_quat", "object")}
        self.expert = TASKS[self.env_args["env_name"]].expert()

    def act(self, obs: dict[str, torch.Tensor]) -> torch.Tensor:
        now = {key: obs[key][0, -1].double().numpy() for key in self.low_dim}
        return torch.from_numpy(self.expert.act(now, np.zeros(3)))[None, None]


@EACH_TASK
def test_robomimic_reads_a_collected_file_and_a_rollout_runs_in_its_environment(name: str, tmp_path: Path) -> None:
    out = tmp_path / "demos.hdf5"
    config = CollectConfig(out=out, task=name, demos=1, cameras=(CAMERA,), image_size=SIZE, next_obs=True)
    collected = collect(config, progress=False)
    assert (collected.demos, collected.attempts) == (1, 1)
    _read_with_robomimic(out, name, collected.steps)
    config = RolloutConfig(run=Path("expert"), episodes=1, device="cpu")
    result = rollout(config, progress=False, policy=Expert(out))
    assert (result.successes, result.episodes) == (1, 1)
    assert result.records[0].steps < TASKS[name].rollout_horizon / 2


def _read_with_robomimic(path: Path, name: str, steps: int) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.importorskip("robomimic")
        from robomimic.utils import obs_utils
        from robomimic.utils.dataset import SequenceDataset

        keys = (CAMERA, *TASKS[name].low_dim_keys)
        obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"rgb": [CAMERA], "low_dim": list(keys[1:])}})
        dataset = SequenceDataset(
            str(path),
            obs_keys=keys,
            dataset_keys=("actions", "rewards", "dones"),
            filter_by_attribute="train",
            load_next_obs=True,  # as for offline RL
            hdf5_use_swmr=False,  # the test has the file open too
        )
    with h5py.File(path) as file:
        demo = file["data/demo_0"]
        assert len(dataset) == steps
        item = dataset[steps - 1]
        for key in keys:
            np.testing.assert_array_equal(item["obs"][key][0], demo[f"obs/{key}"][-1], err_msg=key)
            np.testing.assert_array_equal(item["next_obs"][key][0], demo[f"next_obs/{key}"][-1], err_msg=key)
            np.testing.assert_array_equal(demo[f"next_obs/{key}"][:-1], demo[f"obs/{key}"][1:], err_msg=key)
            assert not np.array_equal(demo[f"next_obs/{key}"][-1], demo[f"obs/{key}"][-1]), key
        np.testing.assert_array_equal(item["actions"][0], demo["actions"][-1])
        assert (item["rewards"][0], item["dones"][0]) == (demo["rewards"][-1], 1)
    dataset.close_and_delete_hdf5_handle()
