from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
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
from cache_pipeline.encoders.frozen import frozen_encoders
from cache_pipeline.encoders.image_encoder import EncoderSpec
from cache_pipeline.encoders.precision import cpu_has_bf16
from cache_pipeline.errors import CheckpointError, ConfigError, OptionError, StaleCacheError
from cache_pipeline.policies.batch import Batch
from cache_pipeline.runs.metrics import read_metrics
from cache_pipeline.runs.policy import load_policy
from cache_pipeline.runs.record import read_record
from cache_pipeline.training.config import FinetuneConfig, SavingConfig
from cache_pipeline.training.finetune import finetune
from cache_pipeline.training.result import TrainResult
from cache_pipeline.training.train import train
from cache_pipeline.training.update import learner as learner_module
from cache_pipeline.training.update.unfreezing import frozen_cut, unfreeze

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


def changed_layers(result: TrainResult) -> set[str]:
    """Stages of the encoder whose weights at the end are not those that the run began with."""
    first, policy = load_file(result.run / "encoder.safetensors"), load_policy(result.checkpoint)
    encoder = policy.obs_encoder.key_model_map["agentview_image"]
    names = dict(encoder.named_parameters())
    return {name.split(".")[1] for name, value in names.items() if not torch.equal(value, first[name])}


def test_fine_tuning_compares_live_features_with_the_runs_cache_and_trains_the_whole_encoder(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "cache_pipeline")
    result = finetune(tuning(base, tmp_path / "tuned"), progress=False)
    assert result.source == "live"
    assert any("cached and live features differ by" in line for line in caplog.messages)
    assert changed_layers(result) == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}


def edited(dataset: Path, out: Path, change: Callable[[h5py.Group], None]) -> Path:
    """A copy of the dataset with the obs of each demo changed."""
    out.write_bytes(dataset.read_bytes())
    with h5py.File(out, "r+") as file:
        for demo in file["data"].values():
            change(demo["obs"])
    return out


def invert_agentview(obs: h5py.Group) -> None:
    obs["agentview_image"][:] = 255 - obs["agentview_image"][:]


def exchange_cameras(obs: h5py.Group) -> None:
    one, other = obs["agentview_image"][:], obs["robot0_eye_in_hand_image"][:]
    obs["agentview_image"][:], obs["robot0_eye_in_hand_image"][:] = other, one


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (invert_agentview, r"demo_0, a demo of .*, is not in the data: its agentview_image differs"),
        (exchange_cameras, r"its agentview_image is the recorded robot0_eye_in_hand_image: the two were exchanged"),
    ],
)
def test_other_frames_are_refused_by_what_differs(
    change: Callable[[h5py.Group], None], named: str, base: Path, dataset: Path, tmp_path: Path
) -> None:
    other = edited(dataset, tmp_path / "other.hdf5", change)
    with pytest.raises(CheckpointError, match=named):
        finetune(tuning(base, tmp_path / "tuned", datasets=(other,)), progress=False)
    assert not (tmp_path / "tuned").exists()


def without_contents(run: Path, out: Path) -> Path:
    """A copy of a run of before runs recorded what their demos hold."""
    shutil.copytree(run, out)
    value = json.loads((out / "run.json").read_text())
    del value["data"]["contents"]
    (out / "run.json").write_text(json.dumps(value))
    return out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (invert_agentview, r"agentview_image: \d+ of \d+ compared frames are not those"),
        (exchange_cameras, r"agentview_image: its frames are those of camera robot0_eye_in_hand_image"),
    ],
)
def test_other_frames_are_refused_by_a_run_that_does_not_record_its_contents(
    change: Callable[[h5py.Group], None], named: str, base: Path, dataset: Path, tmp_path: Path
) -> None:
    other, base = edited(dataset, tmp_path / "other.hdf5", change), without_contents(base, tmp_path / "base")
    with pytest.raises(CheckpointError, match=named):
        finetune(tuning(base, tmp_path / "tuned", datasets=(other,)), progress=False)
    assert not (tmp_path / "tuned").exists()


def test_features_beyond_the_caches_recorded_error_are_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FeatureCache.features

    def noisy(self: FeatureCache, camera: str, rows: Any = None, view: int = 0) -> Any:
        stored = real(self, camera, rows, view)
        deviation = stored.std(0).mean()
        return stored + 0.5 * deviation * np.random.default_rng(0).standard_normal(stored.shape).astype(stored.dtype)

    monkeypatch.setattr(FeatureCache, "features", noisy)
    with pytest.raises(CheckpointError, match=r"differ from live ones on \d+ frames by 0\.\d+ of their variation"):
        finetune(tuning(base, tmp_path / "tuned"), progress=False)


def test_a_run_on_bfloat16_features_is_fine_tuned_in_bfloat16(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if not cpu_has_bf16():
        pytest.skip("this CPU does not multiply bfloat16")
    cache = extracted(dataset, tmp_path / "bf16.zarr", precision="bf16", store_dtype="float16")
    run = train(config(tmp_path / "run", cache, steps=300), progress=False).run
    tuned = finetune(tuning(run, tmp_path / "tuned", precision="auto", unfreeze="layer4"), progress=False).run
    assert read_record(tuned).precision == "bf16"


def test_bfloat16_that_the_device_emulates_is_left_for_fp32_and_said(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = extracted(dataset, tmp_path / "bf16.zarr", precision="bf16", store_dtype="float16")
    run = train(config(tmp_path / "run", cache, steps=1), progress=False).run
    monkeypatch.setattr("cache_pipeline.encoders.precision.cpu_has_bf16", lambda: False)
    caplog.set_level("INFO", "cache_pipeline")
    tuned = finetune(tuning(run, tmp_path / "tuned", precision="auto", unfreeze="layer4"), progress=False).run
    assert read_record(tuned).precision == "fp32"
    assert "computed in bf16, which this device lacks; it trains in fp32" in caplog.text


def test_the_policy_is_measured_before_the_first_step_and_stays_the_best_if_nothing_helps(
    base: Path, tmp_path: Path
) -> None:
    result = finetune(tuning(base, tmp_path / "tuned", encoder_lr=1e-3, lr=0.03), progress=False)
    assert result.start_action_mse is not None
    assert (result.best_step, result.best_action_mse) == (0, result.start_action_mse)
    assert any("did NOT help" in line for line in result.lines())
    rows = read_metrics(result.run)
    assert (rows[0]["step"], rows[0]["validation/action_mse"]) == (0, pytest.approx(result.start_action_mse))
    acting = dict(load_policy(result.run).policy_parameters())
    assert all(torch.equal(value, acting[name]) for name, value in load_policy(base).policy_parameters())


def test_the_encoders_rate_follows_the_variation_of_the_features_unless_one_is_given(
    base: Path, tmp_path: Path
) -> None:
    rates = {}
    for asked in (None, 3e-4):
        last = finetune(tuning(base, tmp_path / str(asked), encoder_lr=asked, steps=1), progress=False).checkpoint
        rates[asked] = float(load_file(last / "resume" / "optimizer.safetensors")["peak_rate/encoder"])
    inputs = load_policy(base).inputs
    cameras = [slice(0, 512), slice(512, 1024)]
    variation = min(float(inputs.spread[part].norm() / inputs.offset[part].norm()) for part in cameras)
    assert 0 < variation < 1
    assert rates == {None: pytest.approx(1e-5 * variation, rel=1e-5), 3e-4: pytest.approx(3e-4)}


def test_with_spatial_softmax_the_encoders_rate_is_whole(
    frontier: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "cache_pipeline")
    run = train(config(tmp_path / "run", frontier, pooling="spatial_softmax", steps=1), progress=False).run
    assert load_policy(run).feature_variation() is None
    last = finetune(tuning(run, tmp_path / "tuned", encoder_lr=None, steps=1), progress=False).checkpoint
    assert float(load_file(last / "resume" / "optimizer.safetensors")["peak_rate/encoder"]) == pytest.approx(1e-5)
    assert "encoder learning rate 1e-05" in [record.getMessage() for record in caplog.records]


def test_a_schedule_that_reaches_past_the_end_is_refused_by_both_numbers(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"layer3@2000, but training ends after --steps 3"):
        finetune(tuning(base, tmp_path / "run", unfreeze_schedule="layer4@0,layer3@2000", steps=3), progress=False)
    assert not (tmp_path / "run").exists()


def test_only_named_layers_learn_and_patterns_hold_parameters_still(base: Path, tmp_path: Path) -> None:
    result = finetune(
        tuning(base, tmp_path / "a", unfreeze="layer4,layer3", freeze="layer4.*", steps=2), progress=False
    )
    assert changed_layers(result) == {"layer3"}


def test_frontier_fine_tuning_equals_live_fine_tuning_step_for_step(base: Path, frontier: Path, tmp_path: Path) -> None:
    live = finetune(tuning(base, tmp_path / "live", unfreeze="layer4"), progress=False)
    cached = finetune(tuning(base, tmp_path / "cached", unfreeze="layer4", cache=frontier), progress=False)
    assert (live.source, cached.source) == ("live", "resident")
    np.testing.assert_allclose(losses(cached.run), losses(live.run), rtol=1e-4)
    assert changed_layers(cached) == {"layer4"}


def test_a_schedule_moves_from_the_frontier_cache_to_live_frames_without_a_jump(
    base: Path, frontier: Path, tmp_path: Path
) -> None:
    schedule = {"unfreeze_schedule": "layer4@0,layer3@2"}
    live = finetune(tuning(base, tmp_path / "live", **schedule), progress=False)
    moved = finetune(tuning(base, tmp_path / "moved", cache=frontier, **schedule), progress=False)
    assert moved.source == "resident+live"
    np.testing.assert_allclose(losses(moved.run), losses(live.run), rtol=1e-4)
    assert changed_layers(moved) == {"layer3", "layer4"}


def test_a_fine_tuned_run_carries_its_encoder_and_acts_after_loading(base: Path, dataset: Path, tmp_path: Path) -> None:
    tuned, data = finetune(tuning(base, tmp_path / "tuned", steps=2), progress=False).checkpoint, Dataset.open(dataset)
    obs = {camera: torch.from_numpy(data.frames(0, camera, 2, 4))[None] for camera in data.cameras}
    obs |= {key: torch.from_numpy(data.rows(0)[f"low_dim/{key}"][2:4])[None] for key in data.low_dim}
    actions = [load_policy(run).act(obs, torch.Generator().manual_seed(0)) for run in (tuned, tuned, base)]
    assert torch.equal(actions[0], actions[1])
    assert not torch.equal(actions[0], actions[2])


def test_batch_norm_statistics_move_only_when_asked(base: Path, tmp_path: Path) -> None:
    name = "net.layer4.1.bn2.running_mean"
    first = load_file(base / "encoder.safetensors")[name]
    for how, moves in (("frozen", False), ("update", True)):
        last = finetune(tuning(base, tmp_path / how, batchnorm=how, steps=2), progress=False).checkpoint
        tuned = load_policy(last).obs_encoder.key_model_map["agentview_image"].state_dict()[name]
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


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"freeze": "layer9.*"}, r"--freeze layer9\.\* has no effect: it matches no parameter that is to learn"),
        ({"freeze": "layer3.*", "unfreeze": "layer4"}, r"--freeze layer3\.\* has no effect"),
        ({"freeze": "*"}, "leaves nothing of the encoder to learn"),
    ],
)
def test_patterns_that_hold_nothing_or_everything_still_are_refused(
    options: dict[str, Any], told: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=told):
        finetune(tuning(base, tmp_path / "run", **options), progress=False)
    assert not (tmp_path / "run").exists()


def test_augmentation_of_frames_that_are_never_read_is_refused(base: Path, frontier: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--augment has no effect"):
        finetune(tuning(base, tmp_path / "run", cache=frontier, unfreeze="layer4", augment=True), progress=False)


def test_encoders_tuned_apart_cannot_be_shared(base: Path, tmp_path: Path) -> None:
    tuned = finetune(tuning(base, tmp_path / "tuned", steps=1), progress=False).run
    with pytest.raises(OptionError, match="encoders tuned apart"):
        finetune(tuning(tuned, tmp_path / "run", share_rgb_model=True), progress=False)


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
            r"agentview_image of shape \(24, 24, 3\), the data have \(32, 32, 3\)",
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
    assert frozen_cut(load_policy(base).encoders.values(), layers, "avgpool") == cut


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


def test_a_live_run_that_is_resumed_from_a_frontier_cache_reads_that_cache(
    base: Path, frontier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = tuning(base, tmp_path / "tuned", steps=4, unfreeze="layer4")
    real = learner_module.PolicyLearner.step

    def stop(self: Any, batch: Any, number: int) -> Any:
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(learner_module.PolicyLearner, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(live, progress=False)
    resumed = finetune(replace(live, cache=frontier, resume=True), progress=False)
    assert (resumed.source, resumed.steps) == ("resident", 4)


def test_only_training_reports_the_encoder_and_what_is_trainable(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "cache_pipeline"):
        load_policy(base)
        assert caplog.text == ""
        finetune(tuning(base, tmp_path / "tuned", steps=1, unfreeze="layer4"), progress=False)
    tuned = load_policy(tmp_path / "tuned")
    learning = sum(p.numel() for name, p in tuned.encoder_parameters() if ".layer4." in name)
    learning += sum(p.numel() for p in tuned.obs_encoder.projection.parameters())
    assert f"encoder layers trained from step 0 on: layer4; Encoder: {learning:,} / " in caplog.text
    assert "froze the RGB encoder" not in caplog.text
