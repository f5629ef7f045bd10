"""Sources of env_args."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import pytest

from cache_pipeline.errors import ConfigError
from cache_pipeline.sim.env_args import read_env_args

LIFT = {"env_name": "Lift", "type": 1, "env_kwargs": {"robots": "Panda"}}


def write_hdf5(path: Path, **attributes: str) -> Path:
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs.update(attributes)
    return path


def test_env_args_are_read_from_json(tmp_path: Path) -> None:
    path = tmp_path / "env.json"
    path.write_text(json.dumps(LIFT))
    assert read_env_args(path) == (LIFT, None)


def test_env_args_and_render_flags_are_read_from_a_dataset(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "a.hdf5", env_args=json.dumps(LIFT), render_flags='{"shadow": false}')
    assert read_env_args(path) == (LIFT, {"shadow": False})


def test_a_dataset_without_env_args_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.hdf5 has no env_args"):
        read_env_args(write_hdf5(tmp_path / "a.hdf5"))


@pytest.mark.parametrize("text", ["[1]", "{}", "not json", '{"env_kwargs": {}}'])
def test_a_file_that_describes_no_environment_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "env.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"env\.json has no (readable )?env_args: "):
        read_env_args(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        read_env_args(tmp_path / "absent.json")
