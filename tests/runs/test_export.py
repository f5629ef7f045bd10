from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from training_runs import ENCODER, PREPROCESS, SMALL, config

from cache_pipeline.encoders.image_encoder import EncoderSpec
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.errors import CheckFailedError, ConfigError, MissingExtraError
from cache_pipeline.policies.visuomotor import VisuomotorPolicy
from cache_pipeline.runs import export
from cache_pipeline.runs.export import FORMATS, ExportResult, export_policy
from cache_pipeline.runs.policy import load_policy
from cache_pipeline.training.train import train

GMM = {**SMALL, "low_noise_eval": False}


@pytest.fixture(scope="module")
def flow(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config(tmp_path_factory.mktemp("runs") / "flow", cache, steps=2), progress=False).run


@pytest.fixture(scope="module")
def exported(flow: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExportResult]:
    """The flow run in each format, each in a folder of its own."""
    folders = {ending: tmp_path_factory.mktemp("exported") for ending in FORMATS}
    return {ending: export_policy(flow, folder / f"policy{ending}") for ending, folder in folders.items()}


def frames_and_rows(policy: VisuomotorPolicy, batch: int) -> dict[str, np.ndarray]:
    """Random pixels and rows, by name; no draw of the code under test."""
    rng = np.random.default_rng(batch)
    steps = policy.obs_horizon
    obs = {key: rng.integers(0, 256, (batch, steps, *size, 3), np.uint8) for key, size in policy.cameras.items()}
    for key, shape in policy.low_dim.items():
        obs[key] = rng.uniform(0, 1, (batch, steps, *shape)).astype(np.float32)
    return obs


def noise_for(policy: VisuomotorPolicy, batch: int) -> dict[str, np.ndarray]:
    shape = policy.noise_shape
    return {} if shape is None else {"noise": np.random.default_rng(9).normal(size=(batch, *shape)).astype(np.float32)}


def tensors(values: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in values.items()}


def onnx_function(file: Path) -> Callable[..., np.ndarray]:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda obs, noise: session.run(["actions"], {**obs, **noise})[0]


def pt2_function(file: Path) -> Callable[..., np.ndarray]:
    module = torch.export.load(file).module()
    return lambda obs, noise: module(tensors(obs), **tensors(noise)).numpy()


FUNCTIONS = {".onnx": onnx_function, ".pt2": pt2_function}


def check_acts_like_the_run(run: Path, file: Path) -> None:
    policy, function = load_policy(run), FUNCTIONS[file.suffix](file)
    for batch in (1, 4):
        obs, noise = frames_and_rows(policy, batch), noise_for(policy, batch)
        expected = policy.act(tensors(obs), **tensors(noise)).numpy()
        assert expected.shape == (batch, policy.action_horizon, policy.action_dim)
        np.testing.assert_allclose(function(obs, noise), expected, atol=1e-4, rtol=0)
    other = {key: value[::-1].copy() for key, value in obs.items()}
    assert np.abs(function(other, noise) - expected).max() > 1e-3


@pytest.mark.parametrize("ending", FORMATS)
def test_the_file_of_a_flow_run_acts_like_the_run_on_raw_images(
    flow: Path, exported: dict[str, ExportResult], ending: str
) -> None:
    result = exported[ending]
    check_acts_like_the_run(flow, result.file)
    assert result.batch is None
    assert result.max_abs_error < 1e-4
    assert result.bytes == result.file.stat().st_size
    assert result.latency_ms > 0
    assert result.inputs["agentview_image"] == "uint8 (B, 2, 24, 24, 3)"
    assert result.inputs["noise"] == "float32 (B, 8, 7)"
    assert result.outputs == {"actions": "float32 (B, 8, 7)"}
    assert [path.name for path in result.file.parent.iterdir()] == [result.file.name]
    assert json.loads(json.dumps(result.to_json()))["format"] in "\n".join(result.lines())


@pytest.mark.parametrize(
    ("policy", "options", "ending"), [("gmm", GMM, ".onnx"), ("gmm", GMM, ".pt2"), ("mlp", SMALL, ".onnx")]
)
def test_the_files_of_other_policies_act_like_the_run(
    cache: Path, policy: str, options: dict[str, Any], ending: str, tmp_path: Path
) -> None:
    run = train(config(tmp_path / "run", cache, steps=1, policy=policy, policy_options=options), progress=False).run
    result = export_policy(run, tmp_path / f"policy{ending}")
    check_acts_like_the_run(run, result.file)
    assert ("noise" in result.inputs) == (policy == "gmm")


@pytest.mark.parametrize(
    ("preprocess", "ending"),
    [
        (Preprocess(crop_shape=(17, 20)), ".onnx"),
        (Preprocess(resize_shape=(14, 32), crop_shape=(13, 30)), ".onnx"),
        (Preprocess(resize_shape=(14, 32), crop_shape=(13, 30)), ".pt2"),
    ],
)
def test_crop_resize_and_normalisation_are_in_the_file(
    dataset: Path, preprocess: Preprocess, ending: str, tmp_path: Path
) -> None:
    options = {"datasets": (dataset,), "encoder": ENCODER, "preprocess": preprocess}
    run = train(config(tmp_path / "run", steps=1, **options), progress=False).run
    check_acts_like_the_run(run, export_policy(run, tmp_path / f"policy{ending}").file)


def test_the_file_says_what_a_caller_has_to_know(exported: dict[str, ExportResult]) -> None:
    pt2, onnx = exported[".pt2"].file, exported[".onnx"].file
    extra = {"metadata.json": ""}
    torch.export.load(pt2, extra_files=extra)
    known = json.loads(extra["metadata.json"])
    assert known["cameras"] == ["agentview_image", "robot0_eye_in_hand_image"]
    assert known["env_name"] == "Lift"
    assert (known["obs_horizon"], known["action_horizon"], known["noise_shape"]) == (2, 8, [8, 7])
    assert set(known["low_dim_keys"]) == {"robot0_eef_pos", "robot0_gripper_qpos"}
    properties = onnxruntime.InferenceSession(str(onnx)).get_modelmeta().custom_metadata_map
    assert {key: json.loads(properties[key]) for key in known} == known


def test_the_onnx_file_names_its_batch_dimension(exported: dict[str, ExportResult]) -> None:
    session = onnxruntime.InferenceSession(str(exported[".onnx"].file))
    shapes = {value.name: value.shape for value in (*session.get_inputs(), *session.get_outputs())}
    assert shapes["agentview_image"] == ["batch", 2, 24, 24, 3]
    assert shapes["noise"] == shapes["actions"] == ["batch", 8, 7]
    assert {shape[0] for shape in shapes.values()} == {"batch"}
    inner = onnx.load(exported[".onnx"].file).graph.value_info
    named = {size.dim_param for value in inner for size in value.type.tensor_type.shape.dim} - {""}
    assert named == {"batch", "2*batch"}


def test_a_file_whose_actions_differ_from_the_run_is_not_written(
    flow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = export.read_pt2
    monkeypatch.setattr(export, "read_pt2", lambda path: lambda inputs: read(path)(inputs) + 2e-3)
    with pytest.raises(CheckFailedError, match="differ from the run's by"):
        export_policy(flow, tmp_path / "policy.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_kept_unless_it_may_be_replaced(flow: Path, tmp_path: Path) -> None:
    file = tmp_path / "policy.pt2"
    file.write_text("precious")
    with pytest.raises(ConfigError, match="--overwrite"):
        export_policy(flow, file)
    with pytest.raises(ConfigError, match="is not a policy that export wrote"):
        export_policy(flow, file, overwrite=True)
    assert file.read_text() == "precious"
    file.unlink()
    export_policy(flow, file)
    assert export_policy(flow, file, overwrite=True).bytes > 1000


@pytest.mark.parametrize("name", ["policy.pt", "policy", "policy.ONNX"])
def test_an_unknown_ending_is_refused_before_any_work(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"available: \.onnx, \.pt2"):
        export_policy(tmp_path / "no run", tmp_path / name)


def test_onnx_without_its_packages_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"uv sync --extra onnx"):
        export_policy(tmp_path / "no run", tmp_path / "policy.onnx")


def test_a_policy_of_another_kind_is_refused(flow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "load_policy", lambda run, device, encoder: object())
    with pytest.raises(ConfigError, match="robomimic"):
        export_policy(flow, tmp_path / "policy.pt2")
    assert list(tmp_path.iterdir()) == []


def test_noise_of_another_shape_is_refused(flow: Path) -> None:
    policy = load_policy(flow)
    with pytest.raises(ConfigError, match=r"takes \(B, 8, 7\)"):
        policy.act(tensors(frames_and_rows(policy, 1)), noise=torch.zeros(1, 7, 8))


COUNTING = """
import torch

class Counting(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 5)

    def forward(self, x):
        return self.linear(x.mean((2, 3))) * torch.ones(len(x), 1)

def make():
    torch.manual_seed(3)
    return Counting()
"""


def test_an_encoder_that_counts_its_images_fixes_the_batch_size_at_one_and_the_result_says_so(
    dataset: Path, tmp_path: Path
) -> None:
    (tmp_path / "counting.py").write_text(COUNTING)
    encoder = EncoderSpec(factory=f"{tmp_path / 'counting.py'}:make")
    options = {"datasets": (dataset,), "encoder": encoder, "preprocess": PREPROCESS, "low_dim_keys": ()}
    run = train(config(tmp_path / "run", steps=1, **options), progress=False).run
    result = export_policy(run, tmp_path / "policy.onnx", encoder=encoder.factory)
    assert result.batch == 1
    assert result.inputs["agentview_image"] == "uint8 (1, 2, 24, 24, 3)"
    assert any("batch size 1 only" in line for line in result.lines())
