"""The way back to a live encoder from runs trained to the end, at the defaults of the commands.

``uv run pytest -m stress tests/stress/test_stress_finetune.py -s``: about six minutes on two cores.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cache_pipeline.cli import app
from cache_pipeline.encoders.precision import cpu_has_bf16

SAMPLE = Path(__file__).parents[2] / "data" / "lift_sample.hdf5"
SEEDS = 10

pytestmark = [pytest.mark.stress, pytest.mark.timeout(3600)]


def run(*words: object) -> dict:
    result = CliRunner().invoke(app, ["--quiet", *map(str, words), "--json"])
    assert result.exit_code == 0, (words, result.output)
    return json.loads(result.stdout)


def test_fine_tuning_begins_after_training_to_the_end_for_ten_seeds(tmp_path: Path) -> None:
    cache = tmp_path / "sample.zarr"
    run("extract-features", SAMPLE, "--out", cache, "--no-pretrained-encoder")
    for seed in range(SEEDS):
        trained, tuned = tmp_path / f"run_{seed}", tmp_path / f"tuned_{seed}"
        run("train", "--from-cache", cache, "--out", trained, "--seed", seed)
        result = run("finetune", "--live-encoder", "--checkpoint", trained, "--out", tuned, "--steps", 1)
        print(f"seed {seed}: held-out error {result['start_action_mse']:.4f} before the first step")
        assert result["best_action_mse"] <= result["start_action_mse"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
def test_fine_tuning_begins_live_and_from_a_layer3_cache_in_every_precision(
    precision: str, model: str, tmp_path: Path
) -> None:
    if precision == "bf16" and not cpu_has_bf16():
        pytest.skip("this CPU does not multiply bfloat16")
    options = ["--no-pretrained-encoder", "--rgb-model-name", model, "--precision", precision]
    run("extract-features", SAMPLE, "--out", tmp_path / "avgpool.zarr", *options)
    run("extract-features", SAMPLE, "--out", tmp_path / "layer3.zarr", "--cut", "layer3", *options)
    run("train", "--from-cache", tmp_path / "avgpool.zarr", "--out", tmp_path / "run")
    few = ["--checkpoint", tmp_path / "run", "--steps", 1, "--batch-size", 16]
    run("finetune", "--live-encoder", "--out", tmp_path / "live", *few)
    frontier = ["--from-cache", tmp_path / "layer3.zarr", "--unfreeze", "layer4"]
    run("finetune", *frontier, "--out", tmp_path / "frontier", *few)
