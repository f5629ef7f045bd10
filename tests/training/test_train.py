from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import make_dataset
from safetensors.torch import load_file
from training_runs import config, live, losses

from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.encoders import precision
from cache_pipeline.encoders.image_encoder import EncoderSpec
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.errors import CheckpointError, ConfigError, DatasetError, EncoderError
from cache_pipeline.policies.batch import Batch
from cache_pipeline.runs.metrics import read_metrics
from cache_pipeline.runs.policy import load_policy
from cache_pipeline.runs.summary import inspect_run
from cache_pipeline.training.config import OptimConfig, SavingConfig, TrainConfig
from cache_pipeline.training.session import fitting_batch_size
from cache_pipeline.training.train import open_training, train
from cache_pipeline.training.update import gradients
from cache_pipeline.training.update import learner as learner_module
from cache_pipeline.training.update.distributed import ALONE
from cache_pipeline.training.update.gradients import BatchGradient

RESULT_FIELDS = [
    "run",
    "steps",
    "seconds",
    "steps_per_s",
    "first_loss",
    "final_loss",
    "valid_action_mse",
    "mean_action_mse",
    "source",
    "checkpoint",
    "start_action_mse",
    "best_action_mse",
    "best_step",
    "best_checkpoint",
    "success_rate",
    "best_success_rate",
]


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Sends this process a signal within update ``step``, counted from 1."""
    real = learner_module.PolicyLearner.step

    def step_and_signal(self: Any, batch: Any, index: int) -> torch.Tensor:
        if index == step - 1:
            os.kill(os.getpid(), number)
        return real(self, batch, index)

    monkeypatch.setattr(learner_module.PolicyLearner, "step", step_and_signal)


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config(tmp_path_factory.mktemp("runs") / "run", cache), progress=False).run


def test_the_result_has_exactly_the_fields_that_scripts_rely_on(cache: Path, tmp_path: Path) -> None:
    result = train(config(tmp_path / "run", cache, steps=2), progress=False)
    value = json.loads(json.dumps(result.to_json()))
    assert list(value) == RESULT_FIELDS
    assert value["source"] == "resident"
    assert 0 < value["mean_action_mse"] < 1
    assert Path(value["checkpoint"]).is_dir()


def test_cached_and_live_frozen_training_have_the_same_loss_curve(run: Path, dataset: Path, tmp_path: Path) -> None:
    result = train(live(tmp_path / "live", dataset), progress=False)
    assert result.source == "live"
    np.testing.assert_allclose(losses(result.run), losses(run), rtol=1e-5)
    assert result.valid_action_mse == pytest.approx(inspect_run(run).valid_action_mse, rel=1e-4)


def test_live_training_beside_a_cache_uses_the_encoder_of_the_cache(
    run: Path, cache: Path, dataset: Path, tmp_path: Path
) -> None:
    result = train(config(tmp_path / "live", cache, datasets=(dataset,), source="live"), progress=False)
    assert result.source == "live"
    np.testing.assert_allclose(losses(result.run), losses(run), rtol=1e-5)


@pytest.mark.parametrize("order", ["auto", "block"])
def test_resident_and_streamed_training_see_the_same_samples(order: str, cache: Path, tmp_path: Path) -> None:
    shared = {"order": order, "max_memory": FeatureCache(cache).nbytes() // 2}  # pools of a sixth of the rows
    runs = [
        train(config(tmp_path / "resident", cache, source="resident", **shared), progress=False).run,
        train(config(tmp_path / "streamed", cache, source="streamed", **shared), progress=False).run,
    ]
    assert losses(runs[0]) == losses(runs[1])


@pytest.mark.parametrize("order", ["auto", "block"])
def test_views_are_drawn_alike_by_resident_and_streamed_training(order: str, cache: Path, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"order": order, "max_memory": FeatureCache(cache).nbytes() // 2, "augment": True}
    resident = train(config(tmp_path / "a", cache, source="resident", **shared), progress=False).run
    streamed = train(config(tmp_path / "b", cache, source="streamed", **shared), progress=False).run
    clean = train(config(tmp_path / "c", cache, source="resident", **{**shared, "augment": False}), progress=False).run
    assert losses(resident) == losses(streamed)
    assert losses(resident) != losses(clean)


@pytest.mark.parametrize("policy", ["flow", "mlp", "gmm"])
def test_bfloat16_training_keeps_float32_weights_and_stays_near_float32(
    policy: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    exact = train(config(tmp_path / "fp32", cache, policy=policy), progress=False).run
    fast = train(config(tmp_path / "auto", cache, policy=policy, precision="auto"), progress=False).run
    assert losses(fast) != losses(exact)
    np.testing.assert_allclose(losses(fast), losses(exact), rtol=0.02)
    assert all(value.dtype != torch.bfloat16 for value in load_policy(fast).tensors().values())


def test_copies_of_the_weights_change_no_bit_of_loss_and_gradient(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, drawn = load_policy(run), torch.Generator().manual_seed(0)
    policy.precision = "bf16"
    for _, parameter in policy.policy_parameters():
        parameter.requires_grad_(True)
    obs = {camera: 40 + torch.randn(4, 2, 512, generator=drawn) for camera in policy.cameras}
    obs |= {key: torch.randn(4, 2, *shape, generator=drawn) for key, shape in policy.low_dim.items()}
    batch = Batch(obs, torch.rand(4, 8, 7, generator=drawn), torch.ones(4, 8, dtype=torch.bool))
    found = []
    for copies in (True, False):
        monkeypatch.setattr(gradients, "uses_copies", lambda policy, copies=copies: copies)
        for parts in (1, 2):
            measured = BatchGradient(policy, torch.Generator().manual_seed(1), parts=parts, ranks=ALONE)
            loss = measured(batch, [])
            found.append([loss, *(parameter.grad for _, parameter in policy.policy_parameters())])
            assert all(value.dtype == torch.float32 for value in found[-1])
            policy.zero_grad()
    for with_copies, by_autocast in zip(found[:2], found[2:], strict=True):
        assert all(torch.equal(one, other) for one, other in zip(with_copies, by_autocast, strict=True))


def test_a_step_in_bfloat16_computes_all_layers_in_it_and_acting_in_float32(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[torch.dtype]] = {"loss": set(), "act": set()}
    for copies in (True, False):
        monkeypatch.setattr(gradients, "uses_copies", lambda policy, copies=copies: copies)
        session = open_training(config(tmp_path / "run", cache, precision="bf16"), tmp_path / "run")
        policy, doing = session.policy, "loss"

        def note(module: Any, args: Any, output: torch.Tensor) -> None:
            seen[doing].add(output.dtype)  # noqa: B023

        for module in policy.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(note)
        batch = next(session.enter(session.phases()[0]).batches(session.sampler.plans(0, 1)))
        session.learner.step(batch, 0)
        doing = "act"
        assert policy.act(batch.obs).dtype == torch.float32
        assert seen == {"loss": {torch.bfloat16}, "act": {torch.float32}}
        assert all(value.dtype == torch.float32 for value in policy.parameters())


@pytest.mark.parametrize("choice", ["tf32", "fp32"])
def test_the_flags_of_a_precision_hold_in_the_forward_and_backward_pass(
    choice: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA: the flags are the process's, whatever device computes."""
    session = open_training(config(tmp_path / "run", cache), tmp_path / "run")
    learner, seen = session.learner, {}
    policy = session.policy
    policy.precision = choice
    on_cuda = precision.computing_in
    for module in ("cache_pipeline.training.update.learner", "cache_pipeline.policies.visuomotor"):
        monkeypatch.setattr(f"{module}.computing_in", lambda name, device: on_cuda(name, torch.device("cuda")))

    def note(when: str) -> None:
        seen[when] = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)

    layer = policy.obs_encoder.projection[2]
    layer.register_forward_hook(lambda *args: note("forward"))
    layer.register_full_backward_hook(lambda *args: note("backward"))
    batch = next(session.enter(session.phases()[0]).batches(session.sampler.plans(0, 1)))
    before = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    learner.step(batch, 0)
    wanted = ("high", True) if choice == "tf32" else ("highest", False)
    assert seen == {"forward": wanted, "backward": wanted}
    policy.act(batch.obs)
    assert seen["forward"] == ("highest", False)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


@pytest.mark.parametrize("policy", ["flow", "mlp", "gmm"])
def test_each_policy_trains_and_acts_in_dataset_units(policy: str, cache: Path, dataset: Path, tmp_path: Path) -> None:
    result = train(config(tmp_path / "run", cache, policy=policy, steps=3), progress=False)
    loaded, data = load_policy(result.run), Dataset.open(dataset)
    obs = {camera: torch.from_numpy(data.frames(0, camera, 0, 2))[None] for camera in loaded.cameras}
    rows = data.rows(0)
    obs |= {key: torch.from_numpy(rows[f"low_dim/{key}"][:2])[None] for key in loaded.low_dim}
    actions = loaded.act(obs)
    assert actions.shape == (1, 8, 7)
    assert torch.isfinite(actions).all()


def test_a_loaded_policy_acts_on_frames_as_on_their_cached_features(run: Path, cache: Path, dataset: Path) -> None:
    from cache_pipeline.cache.reader import FeatureCache

    policy, data, stored = load_policy(run), Dataset.open(dataset), FeatureCache(cache)
    low_dim = {key: torch.from_numpy(data.rows(1)[f"low_dim/{key}"][3:5])[None] for key in policy.low_dim}
    row = stored.demos[1].row + 3
    frames = {camera: torch.from_numpy(data.frames(1, camera, 3, 5))[None] for camera in policy.cameras}
    features = {c: torch.from_numpy(stored.features(c, slice(row, row + 2)))[None] for c in policy.cameras}
    noise = [torch.Generator().manual_seed(1) for _ in range(2)]
    torch.testing.assert_close(
        policy.act({**frames, **low_dim}, noise[0]), policy.act({**features, **low_dim}, noise[1]), atol=1e-4, rtol=0
    )


def test_a_run_stopped_by_a_signal_and_resumed_equals_a_straight_run_bit_for_bit(
    run: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(config(out, cache), progress=False)
    assert inspect_run(out).step == 2
    result = train(config(out, cache, resume=True), progress=False)
    assert result.steps == 6
    for name in ("model.safetensors", "ema.safetensors", "resume/optimizer.safetensors"):
        straight = load_file(run / "checkpoints/step_0000006" / name)
        resumed = load_file(result.checkpoint / name)
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    assert losses(out) == losses(run)


def test_a_finished_run_that_is_extended_equals_a_longer_run_bit_for_bit(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At a constant learning rate; otherwise the two schedules differ."""
    constant = OptimConfig(warmup_steps=0, min_lr_ratio=1.0)
    longer = config(tmp_path / "longer", cache, steps=5, optim=constant)
    shorter = replace(longer, out=tmp_path / "extended", steps=2)
    straight = train(longer, progress=False).checkpoint
    train(shorter, progress=False)
    with caplog.at_level("INFO", "cache_pipeline"):
        extended = train(replace(shorter, steps=5, resume=True), progress=False).checkpoint
    assert "now end at step 5, not 2" in caplog.text
    for name in ("model.safetensors", "ema.safetensors", "resume/optimizer.safetensors"):
        one, other = load_file(straight / name), load_file(extended / name)
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert losses(tmp_path / "extended") == losses(tmp_path / "longer")
    assert inspect_run(tmp_path / "extended").steps == 5
    with pytest.raises(CheckpointError, match=r"a run of 5 steps .* give --steps 5, or more to extend it"):
        train(replace(shorter, steps=4, resume=True), progress=False)


def test_statistics_come_from_the_train_split_alone(run: Path, dataset: Path) -> None:
    data, policy = Dataset.open(dataset), load_policy(run)
    actions = np.concatenate([data.rows(demo)["actions"] for demo in range(3)])
    middle = (actions.min(0) + actions.max(0)) / 2
    np.testing.assert_allclose(policy.actions.offset.numpy(), middle, atol=1e-6)


def test_with_one_demo_the_held_out_figures_are_null(tmp_path: Path) -> None:
    one = make_dataset(tmp_path / "one.hdf5", lengths=(9,), cameras={"agentview_image": (24, 24, 3)})
    result = train(live(tmp_path / "run", one, steps=2), progress=False)
    assert result.valid_action_mse is None
    assert result.mean_action_mse is None
    assert inspect_run(result.run).latest == "step_0000002"


def test_the_figures_hold_the_learning_rates_of_the_schedule(dataset: Path, tmp_path: Path) -> None:
    optim = OptimConfig(warmup_steps=0, min_lr_ratio=0.0)
    frozen = train(live(tmp_path / "frozen", dataset, steps=4, lr=0.1, optim=optim), progress=False)
    rows = read_metrics(frozen.run)
    assert [row["training/lr"] for row in rows if row["training/loss"] is not None] == pytest.approx(
        [0.1 * 0.5 * (1 + np.cos(np.pi * step / 4)) for step in range(4)]
    )
    assert {row["training/encoder_lr"] for row in rows} == {None}
    options: dict[str, Any] = {"freeze_encoder": False, "encoder_lr": 1e-6, "steps": 2}
    learning = train(live(tmp_path / "learning", dataset, optim=optim, **options), progress=False)
    assert read_metrics(learning.run)[0]["training/encoder_lr"] == pytest.approx(1e-6)


def test_an_encoder_that_learns_from_the_start_is_saved_with_the_run(dataset: Path, tmp_path: Path) -> None:
    result = train(live(tmp_path / "run", dataset, steps=2, freeze_encoder=False, encoder_lr=1e-3), progress=False)
    first = load_file(result.run / "encoder.safetensors")
    policy = load_policy(result.run)
    tuned = policy.obs_encoder.key_model_map["agentview_image"].state_dict()
    assert not torch.equal(tuned["net.layer4.1.conv2.weight"], first["net.layer4.1.conv2.weight"])
    assert torch.equal(tuned["net.bn1.running_mean"], first["net.bn1.running_mean"])


def test_an_existing_run_is_neither_overwritten_nor_resumed_unasked(run: Path, cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--resume .* --overwrite"):
        train(config(run, cache), progress=False)


def test_resuming_with_another_learning_rate_is_refused_by_name(run: Path, cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lr 0.001 .* 0.5"):
        train(config(run, cache, resume=True, lr=0.5), progress=False)


def test_a_folder_that_is_no_run_is_left_alone(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not a run"):
        train(config(tmp_path / "mine", cache, overwrite=True), progress=False)
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"


def test_names_that_the_data_do_not_have_are_refused_with_the_right_ones(cache: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"cameras": ("agentview",)}, "did you mean agentview_image"),
        ({"low_dim_keys": ("joints",)}, "robot0_eef_pos"),
        ({"filter_key": "trian"}, "did you mean train"),
        ({"policy_options": {"hiden": [3]}}, "did you mean hidden"),
    ):
        error = DatasetError if "filter_key" in options else ConfigError
        with pytest.raises(error, match=message):
            train(config(tmp_path / "run", cache, **options), progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("multiple", "fitting"), [(1, 17), (4, 16), (20, 20)])
def test_a_batch_is_not_larger_than_the_windows_and_stays_a_multiple(
    multiple: int, fitting: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert fitting_batch_size(16, 17, multiple) == 16
    assert caplog.text == ""
    assert fitting_batch_size(10**9, 17, multiple) == fitting
    assert f"batch_size 1000000000 is more than the data's 17 windows; {fitting} is used" in caplog.text


def test_a_huge_batch_size_trains_and_resumes(cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    huge = config(tmp_path / "run", cache, batch_size=10**9, steps=2)
    train(huge, progress=False)
    assert "batch_size 1000000000 is more than the data's" in caplog.text
    assert train(replace(huge, resume=True, steps=3), progress=False).steps == 3


def test_a_loss_that_is_not_finite_stops_the_run(cache: Path, tmp_path: Path) -> None:
    wild = config(tmp_path / "run", cache, lr=1e30, steps=5, optim=OptimConfig(grad_clip=None, warmup_steps=0))
    with pytest.raises(ConfigError, match="lower --lr"):
        train(wild, progress=False)


def test_only_as_many_best_checkpoints_are_kept_as_asked(cache: Path, tmp_path: Path) -> None:
    saving = SavingConfig(log_every=1, eval_every=1, save_every=1, keep_best=2)
    result = train(config(tmp_path / "run", cache, saving=saving), progress=False)
    kept = sorted(path.name for path in (result.run / "checkpoints").iterdir() if path.is_dir())
    summary = inspect_run(result.run)
    assert len(summary.best) == 2
    assert kept == sorted({*summary.best, "step_0000006"})
    errors = {row["step"]: row["validation/action_mse"] for row in read_metrics(result.run)}
    errors = {step: error for step, error in errors.items() if error is not None}
    assert summary.best[0] == f"step_{min(errors, key=errors.get):07d}"


def test_the_config_survives_json(dataset: Path, tmp_path: Path) -> None:
    first = replace(live(tmp_path, dataset), encoder=EncoderSpec(weights="random"), preprocess=Preprocess((32, 32)))
    again = TrainConfig.from_json(json.loads(json.dumps(first.to_json())))
    assert again.to_json() == first.to_json()
    assert replace(again, preprocess=first.preprocess) == first


def test_a_policy_trained_on_rotations_in_six_numbers_acts_in_axis_angle(
    run: Path, cache: Path, tmp_path: Path
) -> None:
    result = train(config(tmp_path / "run", cache, rotation_6d=((3, 6),)), progress=False)
    policy = load_policy(result.run)
    assert (policy.action_dim, policy.noise_shape) == (7, (8, 10))
    before, now = inspect_run(run), inspect_run(result.run)
    assert now.mean_action_mse == pytest.approx(before.mean_action_mse)


def test_feature_dropout_changes_training_and_not_the_first_measurement(run: Path, cache: Path, tmp_path: Path) -> None:
    result = train(config(tmp_path / "run", cache, feature_dropout=0.5, steps=3), progress=False)
    assert losses(result.run) != losses(run)[:3]
    policy = load_policy(result.run)
    policy.feature_dropout = 0.5
    rows = torch.ones(4, policy.inputs.offset.shape[0])
    assert torch.equal(policy._disturbed(rows, None), rows)
    dropped = policy.train()._disturbed(rows, torch.Generator().manual_seed(0))
    assert set(dropped[:, :1024].unique().tolist()) == {0.0, 2.0}
    assert torch.equal(dropped[:, 1024:], rows[:, 1024:])


def test_spatial_softmax_is_trained_with_the_policy_and_survives_a_stop(
    frontier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(tmp_path / "run", frontier, pooling="spatial_softmax", steps=4)
    straight = train(asked, progress=False)
    state = load_file(straight.checkpoint / "model.safetensors")
    name = "obs_encoder.pooling.agentview_image.conv.weight"
    initial = []
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            initial.append(open_training(asked, tmp_path / "run").policy.tensors()[name])
    assert torch.equal(*initial)
    assert not torch.equal(state[name], initial[0])
    stopped = replace(asked, out=tmp_path / "stopped")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(stopped, progress=False)
    resumed = load_file(train(replace(stopped, resume=True), progress=False).checkpoint / "model.safetensors")
    assert all(torch.equal(state[key], resumed[key]) for key in state)
    policy = load_policy(straight.run)
    frames = {camera: np.zeros((1, 2, *size, 3), np.uint8) for camera, size in policy.cameras.items()}
    low_dim = {key: np.zeros((1, 2, *shape), np.float32) for key, shape in policy.low_dim.items()}
    assert torch.isfinite(policy.act({**frames, **low_dim})).all()


def test_pooling_of_vectors_is_refused_with_the_way_out(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"needs feature maps.*--cut layer4"):
        train(config(tmp_path / "run", cache, pooling="spatial_softmax"), progress=False)
    assert not (tmp_path / "run").exists()


def test_frames_of_a_live_run_are_augmented_in_training_and_never_when_acting(dataset: Path, tmp_path: Path) -> None:
    clean, changed = (
        open_training(live(tmp_path / "run", dataset, augment=augment), tmp_path / "run") for augment in (None, True)
    )
    batch = next(clean.enter(clean.phases()[0]).batches(clean.sampler.plans(0, 1)))
    changed.enter(changed.phases()[0])
    drawn = [torch.Generator().manual_seed(0) for _ in range(4)]
    assert clean.policy.loss(batch, drawn[0]) != changed.policy.loss(batch, drawn[1])
    changed.policy.eval()
    torch.testing.assert_close(clean.policy.act(batch.obs, drawn[2]), changed.policy.act(batch.obs, drawn[3]))
