"""Settings of a robomimic config that are used, and those that are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cache_pipeline.errors import ConfigError, MissingExtraError
from cache_pipeline.policies.robomimic import config as bridge

pytest.importorskip("robomimic")

KEYS = {"low_dim": ["robot0_eef_pos"], "rgb": ["agentview_image"]}


def written(path: Path, algo_name: str = "bc", **sections: Any) -> Path:
    value = {"algo_name": algo_name, "observation": {"modalities": {"obs": KEYS}}, **sections}
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize("name", bridge.ALGORITHMS)
def test_the_short_name_of_each_algorithm_is_that_of_its_config(name: str) -> None:
    assert bridge.default_config(f"robomimic:{name}").name == f"robomimic:{name}"


def test_windows_are_as_long_as_the_rnns_horizon_or_the_transformers_context() -> None:
    rnn, transformer = (bridge.default_config(f"robomimic:{name}") for name in ("bc_rnn_gmm", "bc_transformer"))
    assert (rnn.frame_stack, rnn.seq_length, rnn.obs_horizon) == (1, 10, 1)
    assert (transformer.frame_stack, transformer.seq_length, transformer.obs_horizon) == (10, 1, 10)


def test_every_setting_of_a_json_is_kept_and_the_rest_is_robomimics_default(tmp_path: Path) -> None:
    path = written(
        tmp_path / "mine.json",
        train={"seq_length": 4, "frame_stack": 2, "batch_size": 7, "hdf5_filter_key": "good"},
        algo={"actor_layer_dims": [8], "optim_params": {"policy": {"learning_rate": {"initial": 0.5}}}},
    )
    config = bridge.read_config(path)
    assert (config.seq_length, config.frame_stack, config.batch_size, config.window) == (4, 2, 7, 5)
    assert config.filter_keys == ("good", None)
    assert config.json["algo"]["actor_layer_dims"] == [8]
    assert config.json["algo"]["optim_params"]["policy"]["learning_rate"]["initial"] == 0.5
    assert config.json["algo"]["optim_params"]["policy"]["learning_rate"]["decay_factor"] == 0.1
    assert (config.cameras, config.low_dim) == (("agentview_image",), ("robot0_eef_pos",))


def test_cameras_become_low_dim_keys_and_nothing_else_changes(tmp_path: Path) -> None:
    config = bridge.read_config(written(tmp_path / "mine.json"))
    changed = config.on_features(config.cameras, config.low_dim)
    obs = changed.json["observation"]["modalities"].pop("obs")
    config.json["observation"]["modalities"].pop("obs")
    assert obs["low_dim"] == ["robot0_eef_pos", "agentview_image"]
    assert obs["rgb"] == []
    assert changed.json == config.json


def test_given_horizons_override_the_config_and_set_the_networks_horizon() -> None:
    rnn = bridge.with_horizons(bridge.default_config("robomimic:bc_rnn"), frame_stack=None, seq_length=3, batch_size=5)
    assert (rnn.seq_length, rnn.batch_size, rnn.json["algo"]["rnn"]["horizon"]) == (3, 5, 3)
    transformer = bridge.default_config("robomimic:bc_transformer")
    assert bridge.with_horizons(transformer, frame_stack=4, seq_length=None, batch_size=None).context_length == 4


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"algo_name": "hbc"}, "available: bc, bcq, cql, iql, td3_bc"),
        ({"train": {"sequence_length": 3}}, "sequence_length"),
        ({"train": 3}, "robomimic expects an object"),
        ({"train": {"seq_length": 0}}, "train.seq_length is 0"),
        ({"train": {"goal_mode": "last"}}, "goals"),
        ({"observation": {"modalities": {"obs": {"rgb": []}}}}, "names no cameras"),
        ({"observation": {"modalities": {"obs": {**KEYS, "depth": ["agentview_depth"]}}}}, "modality depth"),
        ({"algo": {"transformer": {"enabled": True}}}, "context_length is 10, but windows have 1"),
        ({"algo": {"rnn": {"enabled": True, "horizon": 0}}}, r"algo.rnn.horizon is 0 .* at least 1"),
        ({"algo": {"rnn": {"enabled": True, "horizon": None}}}, r"algo.rnn.horizon is None .* at least 1"),
        ({"algo": {"transformer": {"enabled": True, "context_length": -1}}}, r"context_length is -1 .* at least 1"),
        ({"algo": {"transformer": {"enabled": True, "context_length": None}}}, r"context_length is None .* at least 1"),
    ],
)
def test_a_json_that_cannot_be_trained_is_refused_in_one_line(
    tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    value = {"algo_name": "bc", "observation": {"modalities": {"obs": KEYS}}, **sections}
    (tmp_path / "mine.json").write_text(json.dumps(value))
    with pytest.raises(ConfigError, match=message) as caught:
        bridge.read_config(tmp_path / "mine.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_a_file_that_is_not_a_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.json"):
        bridge.read_config(tmp_path / "mine.json")


def test_a_misspelt_algorithm_is_answered_with_the_right_one() -> None:
    with pytest.raises(ConfigError, match="did you mean robomimic:bc_rnn_gmm"):
        bridge.default_config("robomimic:bc_rnn_gm")


def test_without_robomimic_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "robomimic"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "robomimic", None)
    with pytest.raises(MissingExtraError, match=r"uv sync --extra robomimic"):
        bridge.default_config("robomimic:bc")


def test_what_robomimic_prints_stays_off_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with bridge.quiet():
        print("Created GPT model")
    assert capsys.readouterr().out == ""
