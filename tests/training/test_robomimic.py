"""robomimic's algorithms trained from a cache: their windows, their updates, their checkpoints."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from fakes import make_dataset
from safetensors.torch import load_file
from torch import Tensor
from training_runs import extracted, losses

from cache_pipeline.cache.export import export_robomimic, feature_key
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.errors import CheckpointError, ConfigError, EncoderError
from cache_pipeline.policies.robomimic.config import ALGORITHMS
from cache_pipeline.runs.checkpoint import find_checkpoint
from cache_pipeline.runs.policy import load_policy
from cache_pipeline.runs.record import read_record
from cache_pipeline.runs.summary import inspect_run
from cache_pipeline.sim.acting import Actor
from cache_pipeline.training import robomimic as module
from cache_pipeline.training.config import SavingConfig, TrainConfig
from cache_pipeline.training.data.sampler import Sampler
from cache_pipeline.training.train import open_training, train

pytest.importorskip("robomimic")

CAMERAS = ["agentview_image", "robot0_eye_in_hand_image"]
LOW_DIM = ["robot0_eef_pos", "robot0_gripper_qpos"]
SMALL_RL = {
    "actor": {"layer_dims": [16]},
    "critic": {"layer_dims": [16]},
}
SMALL: dict[str, dict[str, Any]] = {
    "bc": {"actor_layer_dims": [16], "rnn": {"hidden_dim": 16}, "transformer": {"embed_dim": 16, "num_layers": 1}},
    "iql": SMALL_RL,
    "td3_bc": SMALL_RL,
    "cql": SMALL_RL,
    "bcq": {
        **SMALL_RL,
        "action_sampler": {
            "actor_layer_dims": [16],
            "vae": {"encoder_layer_dims": [16], "decoder_layer_dims": [16], "latent_dim": 4},
        },
    },
}
SMALL["bc"]["transformer"]["num_heads"] = 2


def small(path: Path, name: str, **train_section: Any) -> Path:
    """A JSON of the algorithm with networks that fit a test."""
    algorithm, parts = ALGORITHMS[name]
    algo = json.loads(json.dumps(SMALL[algorithm]))
    section: dict[str, Any] = {"batch_size": 8, "hdf5_normalize_obs": True}
    for part in parts:
        algo.setdefault(part, {})["enabled"] = True
    if "rnn" in parts:
        algo["rnn"]["horizon"] = section["seq_length"] = 4
    if "transformer" in parts:
        algo["transformer"]["context_length"] = section["frame_stack"] = 4
    value = {
        "algo_name": algorithm,
        "algo": algo,
        "train": {**section, **train_section},
        "experiment": {"epoch_every_n_steps": 2},
        "observation": {"modalities": {"obs": {"low_dim": LOW_DIM, "rgb": CAMERAS}}},
    }
    path.write_text(json.dumps(value))
    return path


def config(out: Path, cache: Path, theirs: Path | None, **options: Any) -> TrainConfig:
    defaults: dict[str, Any] = {"steps": 2, "device": "cpu", "augment": False}
    saving = SavingConfig(log_every=1, eval_every=2)
    return TrainConfig(cache=cache, out=out, robomimic_config=theirs, saving=saving, **{**defaults, **options})


def tensors(run: Path, name: str = "model.safetensors") -> dict[str, Tensor]:
    return load_file(find_checkpoint(run, latest=True)[1] / name)


def frames_of(dataset: Path, demo: int, start: int, stop: int) -> dict[str, Tensor]:
    data = Dataset.open(dataset)
    obs = {camera: torch.from_numpy(data.frames(demo, camera, start, stop))[None] for camera in CAMERAS}
    rows = data.rows(demo)
    return obs | {key: torch.from_numpy(rows[f"low_dim/{key}"][start:stop])[None] for key in LOW_DIM}


def part(obs: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {key: values[:, start:stop] for key, values in obs.items()}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_each_algorithm_updates_its_networks_from_a_cache_and_prints_nothing(
    name: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = small(tmp_path / "mine.json", name)
    before = open_training(config(tmp_path / "run", cache, theirs), tmp_path / "run").learner.state().model
    before = {key: value.clone() for key, value in before.items()}
    result = train(config(tmp_path / "run", cache, theirs), progress=False)
    after = tensors(result.run)
    assert after.keys() == before.keys()
    learned = {key.split(".")[1] for key in after if not torch.equal(after[key], before[key])}
    expected = {"bc": {"policy"}, "bcq": {"critic", "action_sampler"}}.get(ALGORITHMS[name][0], {"actor", "critic"})
    assert expected <= learned
    assert result.valid_action_mse is not None
    assert result.valid_action_mse > 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "frame_stack", "seq_length", "pads"),
    [
        ("bc_rnn_gmm", 1, 4, True),
        ("bc_rnn_gmm", 3, 5, True),
        ("bc_rnn_gmm", 2, 3, False),
        ("bc_transformer_gmm", 4, 1, True),
        ("bc_transformer_gmm", 4, 3, True),
        ("iql", 1, 1, True),
        ("iql", 3, 2, True),
    ],
)
def test_batches_equal_those_of_sequence_dataset_over_the_exported_features(
    name: str, frame_stack: int, seq_length: int, pads: bool, cache: Path, tmp_path: Path
) -> None:
    from robomimic.utils.dataset import SequenceDataset

    shape = {"frame_stack": frame_stack, "seq_length": seq_length, "pad_frame_stack": pads, "pad_seq_length": pads}
    theirs = small(tmp_path / "mine.json", name, **shape, batch_size=10_000)
    session = open_training(config(tmp_path / "run", cache, theirs), tmp_path / "run")
    windows = len(session.splits[0])
    plan = Sampler(windows, windows, 0).plan(0)
    plan = plan._replace(windows=np.arange(windows))
    batch = next(session.enter(session.phases()[0]).batches([plan]))
    ours = session.learner.robomimic_batch(batch)  # type: ignore[attr-defined]
    keys = {**{key: key for key in LOW_DIM}, **{camera: feature_key(camera) for camera in CAMERAS}}
    export_robomimic(cache, tmp_path / "features.hdf5")
    reference = SequenceDataset(
        str(tmp_path / "features.hdf5"),
        obs_keys=tuple(keys.values()),
        dataset_keys=("actions", "rewards", "dones"),
        filter_by_attribute="train",
        load_next_obs=True,
        get_pad_mask=True,
        hdf5_cache_mode=None,
        **shape,
    )
    items = [reference[index] for index in range(len(reference))]
    assert len(items) == windows
    policy = session.policy
    groups = ("obs", "next_obs") if name == "iql" else ("obs",)
    for group in groups:
        assert set(ours[group]) == set(keys)
        for key, theirs_key in keys.items():
            wanted = np.stack([item[group][theirs_key] for item in items])
            wanted = (wanted - policy.mean[key].numpy()) / policy.std[key].numpy()
            np.testing.assert_allclose(ours[group][key].numpy(), wanted, rtol=1e-6, atol=1e-6)
    for key in ("actions", "rewards", "dones") if name == "iql" else ("actions",):
        np.testing.assert_array_equal(ours[key].numpy(), np.stack([item[key] for item in items]))
    np.testing.assert_array_equal(batch.mask.numpy(), np.stack([item["pad_mask"][:, 0] for item in items]))


def test_normalisation_equals_that_of_sequence_dataset(cache: Path, tmp_path: Path) -> None:
    from robomimic.utils import obs_utils
    from robomimic.utils.dataset import SequenceDataset

    session = open_training(config(tmp_path / "run", cache, small(tmp_path / "mine.json", "bc")), tmp_path / "run")
    policy = session.policy
    keys = {**{key: key for key in LOW_DIM}, **{camera: feature_key(camera) for camera in CAMERAS}}
    export_robomimic(cache, tmp_path / "features.hdf5")
    obs_utils.initialize_obs_modality_mapping_from_dict({"low_dim": list(keys.values())})
    reference = SequenceDataset(
        str(tmp_path / "features.hdf5"),
        obs_keys=tuple(keys.values()),
        dataset_keys=("actions",),
        filter_by_attribute="train",
        load_next_obs=False,
        hdf5_normalize_obs=True,
    )
    stats = reference.get_obs_normalization_stats()
    for key, theirs in keys.items():
        np.testing.assert_allclose(policy.mean[key].numpy(), stats[theirs]["mean"][0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(policy.std[key].numpy(), stats[theirs]["std"][0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["bc_rnn_gmm", "bc_transformer_gmm", "iql"])
def test_a_saved_run_acts_on_raw_images_as_the_trained_policy_does_on_features(
    name: str, cache: Path, dataset: Path, tmp_path: Path
) -> None:
    result = train(config(tmp_path / "run", cache, small(tmp_path / "mine.json", name)), progress=False)
    loaded, again = load_policy(result.run), load_policy(result.run)
    assert loaded.env_args["env_name"] == "Lift"
    assert loaded.cameras == dict.fromkeys(CAMERAS, (24, 24))
    stored, raw = FeatureCache(cache), frames_of(dataset, 1, 0, 8)
    row = stored.demos[1].row
    cached = {camera: torch.from_numpy(stored.features(camera, slice(row, row + 8)))[None] for camera in CAMERAS}
    features, horizon = {**raw, **cached}, loaded.obs_horizon
    for policy in (loaded, again):
        policy.start_episode()
    for step in range(horizon, 8):
        acted = [
            policy.act(part(obs, step - horizon, step), torch.Generator().manual_seed(step))
            for policy, obs in ((loaded, raw), (again, features))
        ]
        assert acted[0].shape == (1, 1, 7)
        torch.testing.assert_close(acted[0], acted[1], atol=1e-4, rtol=0)


def test_a_recurrent_policy_remembers_within_an_episode_and_forgets_at_its_start(
    cache: Path, dataset: Path, tmp_path: Path
) -> None:
    result = train(config(tmp_path / "run", cache, small(tmp_path / "mine.json", "bc_rnn")), progress=False)
    policy, obs = load_policy(result.run), frames_of(dataset, 0, 0, 2)
    first, second = policy.act(part(obs, 0, 1)), policy.act(part(obs, 1, 2))
    policy.start_episode()
    assert torch.equal(policy.act(part(obs, 0, 1)), first)
    policy.start_episode()
    assert not torch.equal(policy.act(part(obs, 1, 2)), second)


@pytest.mark.parametrize("name", ["bc_rnn_gmm", "bc_transformer"])
def test_episodes_side_by_side_act_as_alone(name: str, dataset: Path, cache: Path, tmp_path: Path) -> None:
    """Each has a hidden state of its own, over frames that are encoded for both at once."""
    result = train(config(tmp_path / "run", cache, small(tmp_path / "mine.json", name)), progress=False)
    policy, steps = load_policy(result.run), 6
    actor = Actor(policy, "cpu")
    demos = [{key: values[0].numpy() for key, values in frames_of(dataset, demo, 0, steps).items()} for demo in (0, 2)]

    def actions(chosen: list[int]) -> list[Any]:
        minds = [actor.begin(seed) for seed in chosen]
        for mind, number in zip(minds, chosen, strict=True):
            mind.history.start({key: values[0] for key, values in demos[number].items()})
        found = []
        for step in range(1, steps):
            found.append(np.stack(actor.act(minds)))
            for mind, number in zip(minds, chosen, strict=True):
                mind.history.add({key: values[step] for key, values in demos[number].items()})
        return list(np.stack(found, axis=1))

    both = actions([0, 1])
    assert not np.array_equal(*both)
    for number in (0, 1):
        np.testing.assert_array_equal(actions([number])[0], both[number])
    policy.start_episode()
    first = policy.act(
        {key: torch.from_numpy(np.stack([v[0]] * policy.obs_horizon))[None] for key, v in demos[0].items()}
    )
    if name == "bc_transformer":  # nothing is drawn
        np.testing.assert_allclose(both[0][0], first[0].double(), rtol=1e-4, atol=1e-5)


def test_images_of_every_kind_give_the_same_action_and_others_are_told(
    cache: Path, dataset: Path, tmp_path: Path
) -> None:
    result = train(config(tmp_path / "run", cache, small(tmp_path / "mine.json", "bc")), progress=False)
    policy, obs = load_policy(result.run), frames_of(dataset, 0, 0, 1)
    expected = policy.act(obs)
    as_numpy = {key: np.asarray(value) for key, value in obs.items()}
    as_float = {key: value / 255 if key in CAMERAS else value.astype(np.float64) for key, value in as_numpy.items()}
    first = {key: np.moveaxis(value, -1, -3) if key in CAMERAS else value for key, value in as_float.items()}
    for given in (as_numpy, as_float, first):
        torch.testing.assert_close(policy.act(given), expected, atol=1e-5, rtol=0)
    with pytest.raises(EncoderError, match="divide them by 255"):
        policy.act({key: value.astype(np.float32) for key, value in as_numpy.items()})


def test_the_held_out_error_of_a_recurrent_policy_is_that_of_its_own_steps(
    cache: Path, dataset: Path, tmp_path: Path
) -> None:
    result = train(config(tmp_path / "run", cache, small(tmp_path / "mine.json", "bc_rnn")), progress=False)
    policy, demo = load_policy(result.run), Dataset.open(dataset).rows(3)
    errors = []
    for start in range(len(demo["actions"])):
        policy.start_episode()
        for step in range(start, min(start + 4, len(demo["actions"]))):
            action = policy.act(frames_of(dataset, 3, step, step + 1))[0, 0].numpy()
            errors.append(np.square(action - demo["actions"][step]))
    assert result.valid_action_mse == pytest.approx(float(np.mean(errors)), rel=1e-3)


@pytest.mark.parametrize("name", ["bc", "bc_transformer_gmm", "td3_bc"])
def test_a_run_stopped_by_a_signal_and_resumed_equals_a_straight_run_bit_for_bit(
    name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = small(tmp_path / "mine.json", name)
    value = json.loads(theirs.read_text())
    rates = {"learning_rate": {"epoch_schedule": [1, 2], "decay_factor": 0.5}}
    value["algo"]["optim_params"] = {"actor" if name == "td3_bc" else "policy": rates}
    theirs.write_text(json.dumps(value))
    straight = train(config(tmp_path / "straight", cache, theirs, steps=5), progress=False)
    real = module.RobomimicLearner.step

    def step_and_signal(self: Any, batch: Any, index: int) -> Tensor:
        if index == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(module.RobomimicLearner, "step", step_and_signal)
        with pytest.raises(KeyboardInterrupt):
            train(config(tmp_path / "stopped", cache, theirs, steps=5), progress=False)
    assert inspect_run(tmp_path / "stopped").step == 3
    torch.rand(1)
    resumed = train(config(tmp_path / "stopped", cache, theirs, steps=5, resume=True), progress=False)
    for file in ("model.safetensors", "resume/optimizer.safetensors"):
        one, two = tensors(straight.run, file), tensors(resumed.run, file)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert losses(straight.run) == losses(resumed.run)


def test_training_leaves_torchs_random_state_as_it_was(cache: Path, tmp_path: Path) -> None:
    theirs = small(tmp_path / "mine.json", "bc_transformer_gmm")
    before = torch.get_rng_state()
    train(config(tmp_path / "run", cache, theirs), progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_learning_rates_follow_robomimics_epochs(cache: Path, tmp_path: Path) -> None:
    theirs = small(tmp_path / "mine.json", "bc")
    value = json.loads(theirs.read_text())
    value["algo"]["optim_params"] = {"policy": {"learning_rate": {"initial": 0.1, "epoch_schedule": [1]}}}
    theirs.write_text(json.dumps(value))
    rates = []
    for steps in (1, 2):
        result = train(config(tmp_path / str(steps), cache, theirs, steps=steps), progress=False)
        rates.append(float(tensors(result.run, "resume/optimizer.safetensors")["lr/policy"]))
    assert rates == [0.1, pytest.approx(0.01)]


def test_options_that_were_given_win_over_the_json(cache: Path, tmp_path: Path) -> None:
    theirs = small(tmp_path / "mine.json", "bc_rnn")
    session = open_training(
        config(tmp_path / "run", cache, theirs, batch_size=3, action_horizon=2, cameras=(CAMERAS[0],), low_dim_keys=()),
        tmp_path / "run",
    )
    batch = next(session.enter(session.phases()[0]).batches(session.sampler.plans(0, 1)))
    assert batch.actions.shape == (3, 2, 7)
    assert set(batch.obs) == {CAMERAS[0]}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rgb": ["frontview_image"]}, "no camera 'frontview_image'; available: agentview_image"),
        ({"rgb": CAMERAS, "low_dim": ["robot0_joint_pos"]}, "no low-dim key 'robot0_joint_pos'; available: robot0"),
    ],
)
def test_keys_that_the_cache_lacks_are_refused_with_those_that_it_has(
    keys: dict[str, list[str]], message: str, cache: Path, tmp_path: Path
) -> None:
    theirs = small(tmp_path / "mine.json", "bc")
    value = json.loads(theirs.read_text())
    value["observation"]["modalities"]["obs"] = keys
    theirs.write_text(json.dumps(value))
    with pytest.raises(ConfigError, match=message):
        train(config(tmp_path / "run", cache, theirs), progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "robomimic:bc_rn"}, "did you mean robomimic:bc_rnn"),
        ({"policy": "robomimic:bc", "lr": 0.1}, "algo.optim_params"),
        ({"policy": "robomimic:bc", "policy_options": {"hidden": [3]}}, "policy_options"),
    ],
)
def test_options_of_other_policies_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path / "run", tmp_path / "cache", None, **options)


def test_rl_without_rewards_is_refused_before_any_work(tmp_path: Path) -> None:
    import h5py

    data = make_dataset(tmp_path / "data.hdf5", lengths=(5, 5))
    with h5py.File(data, "r+") as file:
        for demo in file["data"].values():
            del demo["rewards"]
    cache = extracted(data, tmp_path / "cache.zarr")
    with pytest.raises(ConfigError, match="no rewards"):
        train(config(tmp_path / "run", cache, small(tmp_path / "mine.json", "iql")), progress=False)
    assert not (tmp_path / "run").exists()


def test_maps_below_the_pooling_enter_flat(frontier: Path, tmp_path: Path) -> None:
    session = open_training(config(tmp_path / "run", frontier, small(tmp_path / "mine.json", "bc")), tmp_path / "run")
    shape = FeatureCache(frontier).cameras[CAMERAS[0]].feature_shape
    policy = session.policy
    assert len(shape) == 3
    assert policy.shapes[CAMERAS[0]] == (int(np.prod(shape)),)
    batch = next(session.enter(session.phases()[0]).batches(session.sampler.plans(0, 1)))
    assert torch.isfinite(session.learner.step(batch, 0))


def test_a_damaged_config_of_a_run_is_refused_in_one_line(cache: Path, tmp_path: Path) -> None:
    result = train(config(tmp_path / "run", cache, small(tmp_path / "mine.json", "bc")), progress=False)
    value = json.loads((result.run / "run.json").read_text())
    value["policy"]["options"]["config"]["algo"] = {"actor_layer_dims": "wide"}
    (result.run / "run.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match="damaged") as caught:
        load_policy(result.run)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_are_refused_by_name(cache: Path, tmp_path: Path) -> None:
    result = train(config(tmp_path / "run", cache, small(tmp_path / "mine.json", "bc")), progress=False)
    value = json.loads((result.run / "run.json").read_text())
    value["policy"]["options"]["config"]["algo"]["actor_layer_dims"] = [17]
    (result.run / "run.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=r"nets\.policy.*shape"):
        load_policy(result.run)


def test_a_robomimic_run_is_not_fine_tuned(cache: Path, dataset: Path, tmp_path: Path) -> None:
    from cache_pipeline.training.config import FinetuneConfig
    from cache_pipeline.training.finetune import finetune

    result = train(config(tmp_path / "run", cache, small(tmp_path / "mine.json", "bc")), progress=False)
    with pytest.raises(ConfigError, match="cannot be exported or fine-tuned"):
        finetune(FinetuneConfig(checkpoint=result.run, datasets=(dataset,), out=tmp_path / "tuned", device="cpu"))
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize("normalization", [None, "min_max", "gaussian"])
def test_action_keys_of_robomimics_json_choose_and_normalise_the_actions(
    normalization: str | None, tmp_path: Path
) -> None:
    dataset = make_dataset(tmp_path / "lift.hdf5")
    with h5py.File(dataset, "r+") as file:
        for demo in file["data"].values():
            demo["actions_abs"] = 5 + 3 * demo["actions"][()]
    cache = extracted(dataset, tmp_path / "abs.zarr", action_key=("actions_abs",))
    settings = {"actions_abs": {"normalization": normalization}, "actions": {"normalization": "gaussian"}}
    theirs = small(tmp_path / "mine.json", "bc", action_keys=["actions_abs"], action_config=settings)
    result = train(config(tmp_path / "run", cache, theirs), progress=False)
    record, policy = read_record(result.run), load_policy(result.run)
    assert record.data.action_keys == policy.action_keys == ("actions_abs",)
    assert record.policy.options["config"]["train"]["action_keys"] == ["actions_abs"]
    rows = np.concatenate([Dataset.open(dataset, action_key=["actions_abs"]).rows(i)["actions"] for i in (0, 1)])
    seen = policy.normalized(torch.from_numpy(rows)).numpy()
    if normalization == "min_max":
        np.testing.assert_allclose([seen.min(0), seen.max(0)], [[-1] * 7, [1] * 7], atol=1e-5)
    elif normalization == "gaussian":
        np.testing.assert_allclose([seen.mean(0), seen.std(0)], [[0] * 7, [1] * 7], atol=1e-4)
    else:
        np.testing.assert_array_equal(seen, rows)
    acted = policy.act(frames_of(dataset, 2, 0, 1))[0, 0].numpy()
    assert np.isfinite(acted).all()
    if normalization == "min_max":  # the network's actions lie within ±1
        assert (acted > rows.min(0) - 1e-4).all()
        assert (acted < rows.max(0) + 1e-4).all()


def test_a_cache_of_other_actions_than_robomimics_json_asks_for_is_refused(cache: Path, tmp_path: Path) -> None:
    theirs = small(tmp_path / "mine.json", "bc", action_keys=["actions_abs"])
    with pytest.raises(ConfigError, match="not actions_abs; extract another cache with --action-key actions_abs"):
        open_training(config(tmp_path / "run", cache, theirs), tmp_path / "run")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"action_keys": "actions"}, "give a list of names"),
        ({"action_keys": []}, "give a list of names"),
        ({"action_config": {"actions": 3}}, "must be an object per action key"),
        ({"action_config": {"actions": {"normalization": "log"}}}, "normalises action keys by log"),
        (
            {"action_keys": ["a", "b"], "action_config": {"a": {"normalization": "min_max"}}},
            "normalises action keys by min_max, None",
        ),
        ({"action_config": {"actions": {"convert_at_runtime": "rot_euler"}}}, "converts the rotation of actions"),
    ],
)
def test_action_settings_that_cannot_be_used_are_refused(
    section: dict[str, Any], message: str, cache: Path, tmp_path: Path
) -> None:
    theirs = small(tmp_path / "mine.json", "bc", **section)
    with pytest.raises(ConfigError, match=message):
        open_training(config(tmp_path / "run", cache, theirs), tmp_path / "run")
