from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from object_store import BUCKET, KEYS, s3_server, upload
from safetensors.torch import load_file
from training_runs import config, losses

from cache_pipeline.errors import ConfigError
from cache_pipeline.policies.batch import Batch
from cache_pipeline.runs.summary import inspect_run
from cache_pipeline.training.config import FinetuneConfig, SavingConfig, SourceName, TrainConfig
from cache_pipeline.training.data.sampler import Sampler
from cache_pipeline.training.finetune import finetune
from cache_pipeline.training.train import train
from cache_pipeline.training.update.distributed import ALONE, Ranks
from cache_pipeline.training.update.learner import PolicyLearner


def two(kind: str, options: TrainConfig | FinetuneConfig) -> None:
    for status, text in ranks.start(kind, json.dumps(options.to_json())):
        assert status == 0, text


@pytest.fixture(scope="module")
def alone(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(noisy(tmp_path_factory.mktemp("alone") / "run", cache), progress=False).run


def noisy(out: Path, cache: Path, **options: object) -> TrainConfig:
    return config(out, cache, feature_noise=0.1, feature_dropout=0.1, **options)


def test_two_processes_train_with_the_loss_curve_of_one(alone: Path, cache: Path, tmp_path: Path) -> None:
    two("train", noisy(tmp_path / "two", cache))
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(alone), rtol=1e-5)
    assert inspect_run(tmp_path / "two").valid_action_mse == pytest.approx(
        inspect_run(alone).valid_action_mse, rel=1e-4
    )


@pytest.mark.parametrize("source", ["resident", "streamed"])
def test_two_processes_train_from_one_object_store(
    alone: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: SourceName
) -> None:
    with s3_server() as (endpoint, _):
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": endpoint}.items():
            monkeypatch.setenv(name, value)
        url = f"s3://{BUCKET}/lift.zarr"
        upload(cache, url)
        options = replace(noisy(tmp_path / "two", cache), cache=url, source=source, order="full")
        two("train", options)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(alone), rtol=1e-5)


def test_a_run_of_one_process_goes_on_with_two(alone: Path, cache: Path, tmp_path: Path) -> None:
    saving = SavingConfig(log_every=1, eval_every=0, save_every=3, keep_best=0)
    options = noisy(tmp_path / "run", cache, saving=saving)
    stopped_at(options, 3)
    two("train", replace(options, resume=True))
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone), rtol=1e-5)
    one, other = (load_file(run / "checkpoints/step_0000006/model.safetensors") for run in (alone, tmp_path / "run"))
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)


def stopped_at(options: TrainConfig, step: int) -> None:
    """Leaves the run as it was after ``step``."""
    real = PolicyLearner.step

    def step_and_stop(self: PolicyLearner, batch: Batch, number: int) -> torch.Tensor:
        if number == step:
            raise KeyboardInterrupt
        return real(self, batch, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PolicyLearner, "step", step_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(options, progress=False)


def test_two_processes_fine_tune_with_the_loss_curve_of_one(alone: Path, tmp_path: Path) -> None:
    options = FinetuneConfig(
        checkpoint=alone,
        out=tmp_path / "one",
        steps=3,
        batch_size=4,
        unfreeze_schedule="layer4@0,layer3@2",
        augment=True,
        device="cpu",
        precision="fp32",
        saving=SavingConfig(log_every=1, eval_every=0),
    )
    finetune(options, progress=False)
    two("finetune", replace(options, out=tmp_path / "two"))
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)


def test_an_error_of_one_process_ends_the_others(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    ended = ranks.start("train", json.dumps(noisy(tmp_path / "mine", cache).to_json()))
    assert [status for status, _ in ended] == [1, 1]
    assert "is not a run" in ended[0][1]
    assert "stopped because another one did" in ended[1][1]


def test_a_batch_that_cannot_be_shared_is_refused_with_one_that_can() -> None:
    with pytest.raises(ConfigError, match="--batch-size 66"):
        Ranks(0, 3).check(65)
    ALONE.check(65)


def test_shares_of_a_plan_make_up_the_plan() -> None:
    plan = Sampler(20, 6, 0, views=3).plan(2)
    shares = [Ranks(rank, 3).share(plan) for rank in range(3)]
    assert np.array_equal(np.concatenate([share.windows for share in shares]), plan.windows)
    assert np.array_equal(np.concatenate([share.views for share in shares]), plan.views)


SLOW_SAVES = """
import time
from cache_pipeline.runs import checkpoint
real = checkpoint.write_tensors
def slow(path, tensors):
    time.sleep(0.5)
    return real(path, tensors)
checkpoint.write_tensors = slow
"""


@pytest.mark.parametrize(("told", "times"), [((1,), 1), ((0, 1), 3)])
def test_a_signal_to_any_process_stops_all_of_them_once_the_first_has_saved(
    told: tuple[int, ...], times: int, cache: Path, tmp_path: Path
) -> None:
    saving = SavingConfig(log_every=1, eval_every=0, save_every=0)
    options = config(tmp_path / "run", cache, steps=100_000, saving=saving)
    processes = ranks.launch("train", json.dumps(options.to_json()), before=SLOW_SAVES)
    while len(losses(tmp_path / "run")) < 3:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    for _ in range(times):
        for rank in told:
            processes[rank].send_signal(signal.SIGTERM)
        time.sleep(0.2)
    ended = ranks.ended(processes)
    step = inspect_run(tmp_path / "run").step
    assert step == len(losses(tmp_path / "run"))
    for status, text in ended:
        assert status == 130, text
        assert f"stopped: saved step {step} of 100000 in {tmp_path / 'run'}" in text
    assert "SIGTERM" not in ended[1][1]


SAY_ORDER = """
import sys
from cache_pipeline.training import session
real = session.plan_source
def plan_source(*args, **options):
    plan = real(*args, **options)
    print(plan, file=sys.stderr)
    return plan
session.plan_source = plan_source
"""


def test_processes_with_different_free_memory_train_from_one_kind_of_source(cache: Path, tmp_path: Path) -> None:
    less = """
import os
from cache_pipeline.training.data import sources as data
data.memory_budget = lambda device, most: 10_000 if os.environ["RANK"] == "1" else 1 << 30
"""
    options = config(tmp_path / "run", cache, steps=1)
    ended = ranks.start("train", json.dumps(options.to_json()), before=less + SAY_ORDER)
    assert [status for status, _ in ended] == [0, 0], ended
    orders = [next(line for line in text.splitlines() if "SourcePlan" in line) for _, text in ended]
    assert orders[0] == orders[1]
    assert "streamed" in orders[0]
