"""The sample dataset is found in a checkout and in an installed package."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from cache_pipeline.errors import ConfigError
from cache_pipeline.reports import sample

ROOT = Path(__file__).parents[2]


def test_the_wheel_holds_the_sample_where_the_package_looks_for_it() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    ((source, target),) = build["force-include"].items()
    assert (ROOT / source).is_file()
    assert target == f"{sample.PACKAGE.name}/{sample.NAME}"


def test_the_sample_of_an_installed_package_wins_and_none_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sample.sample_dataset() == ROOT / "data" / "lift_sample.hdf5"
    monkeypatch.setattr(sample, "PACKAGE", tmp_path / "site" / "cache_pipeline")
    with pytest.raises(ConfigError, match="--dataset"):
        sample.sample_dataset()
    (tmp_path / "site/cache_pipeline").mkdir(parents=True)
    (tmp_path / "site/cache_pipeline/lift_sample.hdf5").touch()
    assert sample.sample_dataset().parent == tmp_path / "site/cache_pipeline"
