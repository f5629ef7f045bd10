from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from training_runs import config

from cache_pipeline.encoders import saving as saving_module
from cache_pipeline.errors import CheckpointError, ConfigError
from cache_pipeline.files import digest
from cache_pipeline.policies.batch import Batch
from cache_pipeline.runs.checkpoint import find_checkpoint
from cache_pipeline.runs.policy import load_policy
from cache_pipeline.runs.summary import inspect_run
from cache_pipeline.training import session as session_module
from cache_pipeline.training.config import SavingConfig
from cache_pipeline.training.evaluate import ActionError
from cache_pipeline.training.train import train
from cache_pipeline.training.update.learner import PolicyLearner


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config(tmp_path_factory.mktemp("runs") / "run", cache, steps=2), progress=False).run


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run of its own to damage."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_policy(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_of_a_checkpoint_is_refused(copy: Path, name: str, share: float) -> None:
    file = find_checkpoint(copy)[1] / name
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    refused(copy)


def test_one_flipped_bit_in_the_weights_is_refused(copy: Path) -> None:
    file = find_checkpoint(copy)[1] / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "damaged" in refused(copy)


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("bomb"),)  # type: ignore[return-value]


def test_a_pickle_in_place_of_weights_is_refused_and_never_run(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy)
    folder = find_checkpoint(copy)[1]
    file, record = folder / "model.safetensors", folder / "checkpoint.json"
    file.write_bytes(pickle.dumps(_Bomb()))
    value = json.loads(record.read_text())
    value["files"]["model.safetensors"] = digest(file.read_bytes())
    record.write_text(json.dumps(value))
    assert "safetensors" in refused(copy)
    assert not (copy / "bomb").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 99}', "null", "[" * 100_000])
def test_a_damaged_run_json_is_refused(copy: Path, text: str) -> None:
    (copy / "run.json").write_text(text)
    refused(copy)


def test_a_run_json_that_points_outside_the_run_is_refused(copy: Path) -> None:
    value = json.loads((copy / "run.json").read_text())
    value["policy"]["encoder_files"] = dict.fromkeys(value["policy"]["encoder_files"], "../../secret.safetensors")
    (copy / "run.json").write_text(json.dumps(value))
    assert "outside the run" in refused(copy)


def test_an_index_that_points_outside_the_run_is_not_followed(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    (copy / "checkpoints/index.json").write_text(json.dumps({"latest": "../../other", "best": []}))
    assert find_checkpoint(copy)[1].parent == copy / "checkpoints"
    assert "index.json is damaged ('../../other' is not a name of a checkpoint)" in caplog.text


def test_a_missing_encoder_is_named(copy: Path) -> None:
    (copy / "encoder.safetensors").unlink()
    assert "encoder.safetensors" in refused(copy)


def test_weights_of_another_shape_are_refused_by_name(copy: Path) -> None:
    value = json.loads((copy / "run.json").read_text())
    value["policy"]["emb_dim"] = 8
    (copy / "run.json").write_text(json.dumps(value))
    assert "shape" in refused(copy)


def test_a_path_without_a_run_says_so(tmp_path: Path) -> None:
    assert "neither a run" in refused(tmp_path)


def test_a_run_loads_alike_by_itself_by_its_checkpoint_and_after_it_was_moved(run: Path, copy: Path) -> None:
    policies = [load_policy(path) for path in (run, find_checkpoint(run)[1], copy)]
    for other in policies[1:]:
        pairs = zip(policies[0].state_dict().values(), other.state_dict().values(), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)


def test_inspect_sums_a_run_up_from_json_alone(copy: Path) -> None:
    for file in copy.rglob("*.safetensors"):
        file.unlink()
    summary = inspect_run(copy)
    assert (summary.step, summary.steps, summary.kind, summary.policy) == (2, 2, "train", "flow")
    assert summary.cameras == ("agentview_image", "robot0_eye_in_hand_image")
    assert json.loads(json.dumps(summary.to_json()))["latest"] == "step_0000002"
    assert all("\n" not in line for line in summary.lines())


def test_an_unfinished_save_is_never_taken_for_a_checkpoint(copy: Path) -> None:
    folder = find_checkpoint(copy)[1]
    partial = folder.with_name(".step_0000009.1.partial")
    shutil.copytree(folder, partial)
    (partial / "model.safetensors").write_bytes(b"")
    assert find_checkpoint(copy)[1] == folder
    load_policy(copy)


def test_a_full_disk_while_saving_is_one_line_and_earlier_checkpoints_stay(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = SavingConfig(log_every=1, eval_every=0, save_every=2, keep_best=0)
    real, saved = saving_module.save_file, []

    def full(tensors: Any, path: Path, metadata: Any = None) -> None:
        saved.append(path)
        if len(saved) > 5:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        real(tensors, path, metadata=metadata)

    monkeypatch.setattr(saving_module, "save_file", full)
    with pytest.raises(
        CheckpointError, match=r"step 4 .* no space left .* --resume.* last checkpoint is .*step_0000002"
    ):
        train(config(tmp_path / "run", cache, saving=saving), progress=False)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir() if path.is_dir()] == ["step_0000002"]
    load_policy(tmp_path / "run")
    train(config(tmp_path / "run", cache, saving=saving, resume=True), progress=False)
    assert inspect_run(tmp_path / "run").step == 6


def test_a_full_disk_while_a_run_starts_is_one_line(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(saving_module, "save_file", full)
        with pytest.raises(CheckpointError, match="no space left"):
            train(config(tmp_path / "run", cache, steps=2), progress=False)
    train(config(tmp_path / "run", cache, steps=2), progress=False)


@pytest.mark.parametrize("part", ["weights", "average", "moments"])
@pytest.mark.parametrize("eval_every", [0, 4])
def test_values_that_are_not_finite_are_never_saved(
    part: str, eval_every: int, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PolicyLearner.step

    def overflowing(self: PolicyLearner, batch: Batch, number: int) -> torch.Tensor:
        loss = real(self, batch, number)
        if number == 3:
            assert self._average is not None
            name, weights = next(iter(self._optimizer.parameters.items()))
            memory = {
                "weights": weights.data,
                "average": self._average.tensors()[name],
                "moments": self._optimizer.tensors()[f"exp_avg/{name}"],
            }
            memory[part].fill_(float("inf"))
        return loss

    monkeypatch.setattr(PolicyLearner, "step", overflowing)
    saving = SavingConfig(log_every=1, eval_every=eval_every, save_every=2, keep_best=1)
    with pytest.raises(CheckpointError, match=r"not finite .* the last checkpoint is .*step_0000002; lower --lr"):
        train(config(tmp_path / "run", cache, saving=saving), progress=False)
    assert inspect_run(tmp_path / "run").step == 2
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("*step_*")] == ["step_0000002"]
    load_policy(tmp_path / "run")


def test_a_measurement_that_is_not_finite_is_one_line(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = ActionError(float("nan"), (float("nan"),), 1.0)
    monkeypatch.setattr(session_module, "evaluate", lambda *args, **options: nothing)
    with pytest.raises(ConfigError, match="held-out action error is nan at step 3; no checkpoint was saved before"):
        train(config(tmp_path / "run", cache), progress=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["lr", "encoder_lr", "feature_noise"])
def test_options_that_are_not_finite_are_refused_by_name(name: str, value: float, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=name):
        config(tmp_path / "run", cache, **{name: value})
