"""Options that are made from the config dataclasses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from cache_pipeline.cli import app
from cache_pipeline.training.config import FinetuneConfig, SavingConfig, TrainConfig


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configs with which training is called; nothing is trained."""
    configs: list[Any] = []

    def keep(config: Any) -> Any:
        configs.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("cache_pipeline.training.train.train", keep)
    monkeypatch.setattr("cache_pipeline.training.finetune.finetune", keep)
    return configs


def run(words: str) -> Any:
    return CliRunner().invoke(app, words.split())


def test_without_options_the_commands_take_the_defaults_of_their_configs(called: list[Any]) -> None:
    run("train --from-cache c.zarr")
    run("finetune --checkpoint run --live-encoder")
    assert called == [TrainConfig(cache=Path("c.zarr")), FinetuneConfig(checkpoint=Path("run"))]


def test_options_of_nested_configs_and_parsed_values_reach_the_config(called: list[Any]) -> None:
    run(
        "train --from-cache c.zarr --ema none --grad-clip 0.5 --weight-decay 0 --keep-best 3 --max-memory 2GiB "
        "--policy-option hidden=[8,8] --policy-option activation=relu --rotation-6d 3:6 --cameras a,b"
    )
    (config,) = called
    assert (config.optim.ema, config.optim.grad_clip, config.optim.weight_decay) == (None, 0.5, 0)
    assert (config.saving.keep_best, config.max_memory) == (3, 2 << 30)
    assert config.policy_options == {"hidden": [8, 8], "activation": "relu"}
    assert (config.rotation_6d, config.cameras) == (((3, 6),), ("a", "b"))


def test_a_config_file_gives_all_settings_but_those_that_are_typed(called: list[Any], tmp_path: Path) -> None:
    saved = TrainConfig(
        cache=Path("c.zarr"), lr=0.5, steps=7, out=Path("old"), resume=True, saving=SavingConfig(keep_best=4)
    )
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"format": 1, "kind": "train", "config": saved.to_json()}))
    run(f"train --config {file} --steps 9 --save-every 3 --out new")
    assert called == [
        TrainConfig(
            cache=Path("c.zarr"), lr=0.5, steps=9, out=Path("new"), saving=SavingConfig(keep_best=4, save_every=3)
        )
    ]


def test_a_config_file_with_unknown_settings_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"learning_rate": 1}')
    result = run(f"train --config {tmp_path / 'run.json'}")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "'learning_rate'" in result.stderr


@pytest.mark.parametrize(
    ("content", "words", "status", "message"),
    [
        ({"kind": "finetune", "config": {"lr": 1}}, "--from-cache c", 1, "does not hold settings of train"),
        ({"config": 3}, "--from-cache c", 1, "does not hold settings of train"),
        ([1], "--from-cache c", 1, "it is not a JSON object"),
        ({"datasets": ["d"], "encoder": {"cut": "layer3"}}, "--cut layer4", 2, "names the encoder"),
        ({"lr": -1}, "--from-cache c", 2, "lr is -1"),
    ],
)
def test_a_config_file_that_does_not_fit_is_one_line(
    called: list[Any], tmp_path: Path, content: Any, words: str, status: int, message: str
) -> None:
    (tmp_path / "run.json").write_text(json.dumps(content))
    result = run(f"train --config {tmp_path / 'run.json'} {words}")
    assert (result.exit_code, called) == (status, [])
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_a_cache_replaces_the_encoder_of_a_live_runs_config_file(called: list[Any], tmp_path: Path) -> None:
    live = {"datasets": ["d.hdf5"], "encoder": {"cut": "layer3"}, "preprocess": {"imagenet_norm": False}, "lr": 0.5}
    (tmp_path / "run.json").write_text(json.dumps(live))
    run(f"train --config {tmp_path / 'run.json'}")
    run(f"train --config {tmp_path / 'run.json'} --from-cache c.zarr")
    assert [config.encoder and config.encoder.cut for config in called] == ["layer3", None]
    assert [(config.cache, config.lr) for config in called] == [(None, 0.5), (Path("c.zarr"), 0.5)]


@pytest.mark.parametrize("command", ["train", "finetune", "extract-features"])
def test_help_groups_the_options_and_fits_80_columns(command: str) -> None:
    text = run(f"{command} -h").stdout
    headings = re.findall(r"^(\w+):$", text, re.M)
    expected = ["Data", "Encoder", "Running", "Output"]
    assert [heading for heading in headings if heading in expected] == expected
    assert max(map(len, text.splitlines())) <= 80


def test_a_value_out_of_range_is_a_usage_error(called: list[Any]) -> None:
    result = run("train --from-cache c.zarr --steps 0")
    assert result.exit_code == 2
    assert called == []


def test_json_alone_is_on_stdout_whatever_libraries_print(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def noisy(cache: Path) -> Any:
        print('Downloading: "https://example.org/resnet18.pth"')
        return SimpleNamespace(to_json=lambda: {"units": 1}, lines=lambda: ["fine"], ok=True)

    monkeypatch.setattr("cache_pipeline.cache.integrity.check_integrity", noisy)
    for words, expected in (("verify c --integrity --json", '{"units": 1}\n'), ("verify c --integrity", "fine\n")):
        result = run(words)
        assert (result.stdout, result.stderr.startswith("Downloading")) == (expected, True)
