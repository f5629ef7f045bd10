from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from cache_pipeline.errors import CheckpointError, ConfigError, OptionError
from cache_pipeline.training.config import FinetuneConfig, OptimConfig, SavingConfig, TrainConfig

CACHE = Path("lift.zarr")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": None}, "nothing to train on"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 10**9 + 1}, "steps is 1000000001; it must lie between 1 and 1000000000"),
        ({"lr": 0.0}, "lr is 0"),
        ({"policy": "flo"}, "did you mean flow"),
        ({"source": "ram"}, "resident"),
        ({"source": "live"}, "--dataset FILE"),
        ({"cache": None, "datasets": (Path("a.hdf5"),), "source": "streamed"}, "--from-cache"),
        ({"freeze_encoder": False}, "frozen features"),
        ({"cache": None, "datasets": (Path("a.hdf5"),), "order": "block"}, "order block"),
        ({"resume": True, "overwrite": True}, "one of them"),
        ({"obs_horizon": 0}, "obs_horizon is 0"),
        ({"precision": "fp8"}, "bf16"),
        ({"action_normalization": "z"}, "minmax"),
        ({"feature_noise": float("nan")}, "feature_noise"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        TrainConfig(**{"cache": CACHE, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"ema": 1.5}, {"grad_clip": 0.0}, {"weight_decay": -1.0}, {"warmup_steps": -1}])
def test_optimiser_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        OptimConfig(**options)


def test_a_fine_tuning_config_survives_json() -> None:
    first = FinetuneConfig(
        checkpoint=Path("run"), datasets=(Path("a"),), saving=SavingConfig(keep_best=3), freeze="bn*"
    )
    assert FinetuneConfig.from_json(json.loads(json.dumps(first.to_json()))) == first


def test_a_saved_config_with_an_unknown_option_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="learning_rate"):
        TrainConfig.from_json({"cache": "a.zarr", "learning_rate": 1})


def test_a_batch_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not divide"):
        FinetuneConfig(checkpoint=Path("run"), batch_size=10, accumulate=4)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, 10**400, True, "fast", None, [1e-3]])
def test_a_rate_that_cannot_be_is_a_usage_error(value: Any) -> None:
    with pytest.raises(OptionError, match=r"^lr is "):
        TrainConfig(cache=Path("a.zarr"), lr=value)


@pytest.mark.parametrize("value", [-1, 2**63, 10**40, 1.5, True, "x", None])
def test_a_seed_that_cannot_be_is_a_usage_error(value: Any) -> None:
    with pytest.raises(OptionError, match=r"^seed is "):
        TrainConfig(cache=Path("a.zarr"), seed=value)


@pytest.mark.parametrize("value", ["", " ", "x" * 256, "a/" + "é" * 128, "a\0b"])
def test_a_path_that_cannot_be_is_a_usage_error(value: str) -> None:
    with pytest.raises(OptionError, match=r"^out "):
        TrainConfig(cache=Path("a.zarr"), out=Path(value) if value.strip() else value)
