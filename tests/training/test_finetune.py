from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from fakes import make_dataset
from safetensors.torch import load_file
from training_runs import config, extracted, losses

from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.encoders.image_encoder import EncoderSpec
from cache_pipeline.errors import CheckpointError, ConfigError, StaleCacheError
from cache_pipeline.policies.batch import Batch
from cache_pipeline.training import learner as learner_module
from cache_pipeline.training.checkpoint import load_policy
from cache_pipeline.training.config import FinetuneConfig, SavingConfig
from cache_pipeline.training.data import frozen_encoders
from cache_pipeline.training.finetune import finetune
from cache_pipeline.training.train import train
from cache_pipeline.training.unfreezing import frozen_cut, unfreeze

ENCODERS = "obs_encoder.key_model_map."


def tuning(checkpoint: Path, out: Path, **options: Any) -> FinetuneConfig:
    defaults: dict[str, Any] = {
        "steps": 4,
        "batch_size": 4,
        "encoder_lr": 1e-3,
        "device": "cpu",
        "precision": "fp32",
        "saving": SavingConfig(log_every=1, eval_every=0),
    }
    return FinetuneConfig(checkpoint=checkpoint, out=out, **{**defaults, **options})


@pytest.fixture(scope="module")
def base(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config(tmp_path_factory.mktemp("base") / "run", cache), progress=False).run


def changed_layers(run: Path) -> set[str]:
    """Stages of the encoder whose weights are not those that the run began with."""
    first, policy = load_file(run / "encoder.safetensors"), load_policy(run)
    encoder = policy.obs_encoder.key_model_map["agentview_image"]
    names = dict(encoder.named_parameters())
    return {name.split(".")[1] for name, value in names.items() if not torch.equal(value, first[name])}


def test_fine_tuning_starts_at_the_loss_of_the_cache_and_trains_the_whole_encoder(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "cache_pipeline")
    result = finetune(tuning(base, tmp_path / "tuned"), progress=False)
    assert result.source == "live"
    assert any("on the same batch from the run's cache" in line for line in caplog.messages)
    assert changed_layers(result.run) == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}


def test_a_dataset_with_other_frames_is_refused_by_the_first_loss(base: Path, dataset: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.hdf5"
    other.write_bytes(dataset.read_bytes())
    with h5py.File(other, "r+") as file:
        for demo in file["data"].values():
            for camera in ("agentview_image", "robot0_eye_in_hand_image"):
                demo["obs"][camera][:] = 255 - demo["obs"][camera][:]
    with pytest.raises(CheckpointError, match="the first loss is"):
        finetune(tuning(base, tmp_path / "tuned", datasets=(other,)), progress=False)
    assert not (tmp_path / "tuned").exists()


def test_only_named_layers_learn_and_patterns_hold_parameters_still(base: Path, tmp_path: Path) -> None:
    result = finetune(
        tuning(base, tmp_path / "a", unfreeze="layer4,layer3", freeze="layer4.*", steps=2), progress=False
    )
    assert changed_layers(result.run) == {"layer3"}


def test_frontier_fine_tuning_equals_live_fine_tuning_step_for_step(base: Path, frontier: Path, tmp_path: Path) -> None:
    live = finetune(tuning(base, tmp_path / "live", unfreeze="layer4"), progress=False)
    cached = finetune(tuning(base, tmp_path / "cached", unfreeze="layer4", cache=frontier), progress=False)
    assert (live.source, cached.source) == ("live", "resident")
    np.testing.assert_allclose(losses(cached.run), losses(live.run), rtol=1e-4)
    assert changed_layers(cached.run) == {"layer4"}


def test_a_schedule_moves_from_the_frontier_cache_to_live_frames_without_a_jump(
    base: Path, frontier: Path, tmp_path: Path
) -> None:
    schedule = {"unfreeze_schedule": "layer4@0,layer3@2"}
    live = finetune(tuning(base, tmp_path / "live", **schedule), progress=False)
    moved = finetune(tuning(base, tmp_path / "moved", cache=frontier, **schedule), progress=False)
    assert moved.source == "resident+live"
    np.testing.assert_allclose(losses(moved.run), losses(live.run), rtol=1e-4)
    assert changed_layers(moved.run) == {"layer3", "layer4"}


def test_a_fine_tuned_run_carries_its_encoder_and_acts_after_loading(base: Path, dataset: Path, tmp_path: Path) -> None:
    tuned, data = finetune(tuning(base, tmp_path / "tuned", steps=2), progress=False).run, Dataset.open(dataset)
    obs = {camera: torch.from_numpy(data.frames(0, camera, 2, 4))[None] for camera in data.cameras}
    obs |= {key: torch.from_numpy(data.rows(0)[f"low_dim/{key}"][2:4])[None] for key in data.low_dim}
    actions = [load_policy(run).act(obs, torch.Generator().manual_seed(0)) for run in (tuned, tuned, base)]
    assert torch.equal(actions[0], actions[1])
    assert not torch.equal(actions[0], actions[2])


def test_batch_norm_statistics_move_only_when_asked(base: Path, tmp_path: Path) -> None:
    name = "net.layer4.1.bn2.running_mean"
    first = load_file(base / "encoder.safetensors")[name]
    for how, moves in (("frozen", False), ("update", True)):
        run = finetune(tuning(base, tmp_path / how, batchnorm=how, steps=2), progress=False).run
        tuned = load_policy(run).obs_encoder.key_model_map["agentview_image"].state_dict()[name]
        assert torch.equal(tuned, first) is not moves


def test_fine_tuning_resumed_within_a_schedule_equals_a_straight_run_bit_for_bit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"unfreeze_schedule": "layer4@1,layer3@3"}
    straight = finetune(tuning(base, tmp_path / "straight", **options), progress=False)
    real = learner_module.PolicyLearner.step

    def stop_in_second(self: Any, batch: Any, number: int) -> torch.Tensor:
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(learner_module.PolicyLearner, "step", stop_in_second)
        with pytest.raises(KeyboardInterrupt):
            finetune(tuning(base, tmp_path / "stopped", **options), progress=False)
    resumed = finetune(tuning(base, tmp_path / "stopped", resume=True, **options), progress=False)
    for name in ("model.safetensors", "ema.safetensors", "resume/optimizer.safetensors"):
        one, other = load_file(straight.checkpoint / name), load_file(resumed.checkpoint / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


def test_fine_tuning_is_resumed_in_the_order_that_it_began_with_whatever_the_memory(
    base: Path, frontier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"unfreeze": "layer4", "cache": frontier, "source": "streamed"}
    small, large = FeatureCache(frontier).nbytes() // 2, 1 << 30
    block = finetune(tuning(base, tmp_path / "block", **options, order="block", max_memory=small), progress=False)
    assert losses(block.run) != losses(finetune(tuning(base, tmp_path / "full", **options), progress=False).run)
    real = learner_module.PolicyLearner.step

    def stop_in_second(self: Any, batch: Any, number: int) -> torch.Tensor:
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(learner_module.PolicyLearner, "step", stop_in_second)
        with pytest.raises(KeyboardInterrupt):
            finetune(tuning(base, tmp_path / "stopped", **options, order="block", max_memory=small), progress=False)
    again = tuning(base, tmp_path / "stopped", **options, order="block", max_memory=large, resume=True)
    assert losses(finetune(again, progress=False).run) == losses(block.run)


def test_a_layer_that_the_encoder_does_not_have_is_refused_with_the_right_names(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"layer5.*did you mean layer"):
        finetune(tuning(base, tmp_path / "run", unfreeze="layer5"), progress=False)
    with pytest.raises(ConfigError, match="LAYER@STEP"):
        finetune(tuning(base, tmp_path / "run", unfreeze_schedule="layer4=0"), progress=False)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"action_dim": 5}, "7 action dimensions, the data have 5"),
        ({"cameras": {"agentview_image": (24, 24, 3)}}, "robot0_eye_in_hand_image"),
        (
            {"cameras": {"agentview_image": (32, 32, 3), "robot0_eye_in_hand_image": (24, 24, 3)}},
            r"agentview_image of shape \(24, 24, 3\), they have \(32, 32, 3\)",
        ),
        ({"low_dim": {"robot0_eef_pos": 3}}, "robot0_gripper_qpos"),
        ({"low_dim": {"robot0_eef_pos": 4, "robot0_gripper_qpos": 2}}, "robot0_eef_pos"),
    ],
)
def test_a_checkpoint_that_does_not_fit_the_data_is_refused_by_the_difference(
    options: dict[str, Any], named: str, base: Path, tmp_path: Path
) -> None:
    other = make_dataset(tmp_path / "other.hdf5", lengths=(12, 9, 11, 10), **options)
    with pytest.raises(CheckpointError, match=named):
        finetune(tuning(base, tmp_path / "run", datasets=(other,)), progress=False)
    assert not (tmp_path / "run").exists()


def test_a_frontier_cache_of_other_weights_is_stale(base: Path, dataset: Path, tmp_path: Path) -> None:
    other = extracted(dataset, tmp_path / "other.zarr", encoders=EncoderSpec(weights="random", seed=1, cut="layer3"))
    with pytest.raises(StaleCacheError, match=r"encoder\.weights"):
        finetune(tuning(base, tmp_path / "run", cache=other, unfreeze="layer4"), progress=False)


def test_augmented_fine_tuning_needs_no_crop_and_changes_what_is_learned(base: Path, tmp_path: Path) -> None:
    clean = finetune(tuning(base, tmp_path / "clean", unfreeze="layer4", steps=2), progress=False)
    jittered = finetune(tuning(base, tmp_path / "jittered", unfreeze="layer4", steps=2, augment=True), progress=False)
    assert losses(clean.run) != losses(jittered.run)


@pytest.mark.parametrize(
    ("layers", "cut"),
    [
        ((), "avgpool"),
        (("layer4",), "layer3"),
        (("layer4", "layer2"), "layer1"),
        (("layer1",), None),
        (("layer4", "conv1"), None),
        (("all",), None),
    ],
)
def test_what_lies_below_all_that_learns_is_frozen(base: Path, layers: tuple[str, ...], cut: str | None) -> None:
    policy = load_policy(base)
    assert frozen_cut(policy, layers) == cut


def test_a_frozen_trunk_gives_the_loss_and_the_gradient_of_the_whole_encoder(base: Path, dataset: Path) -> None:
    data = Dataset.open(dataset)
    frames = {camera: torch.from_numpy(data.frames(0, camera, 0, 4)).view(2, 2, 24, 24, 3) for camera in data.cameras}
    rows = data.rows(0)
    low_dim = {key: torch.from_numpy(rows[f"low_dim/{key}"][:4]).view(2, 2, -1) for key in data.low_dim}
    batch = Batch({**frames, **low_dim}, torch.rand(2, 8, 7), torch.ones(2, 8, dtype=torch.bool))
    found = []
    for fast in (False, True):
        policy = load_policy(base)
        encoders = policy.obs_encoder
        if fast:
            encoders.cut_at("layer3")
            policy.frozen_trunks = frozen_encoders(
                dict(encoders.key_model_map.items()), encoders.preprocessing, torch.device("cpu"), "fp32"
            )
        parameters = dict(unfreeze(policy, ("layer4",), None))
        loss = policy.loss(batch, torch.Generator().manual_seed(0))
        torch.autograd.backward(loss)
        found.append((loss.detach(), [parameter.grad for parameter in parameters.values()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)
