from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from training_runs import config

from cache_pipeline.errors import MissingExtraError
from cache_pipeline.training.train import train


class FakeWandb(SimpleNamespace):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__(asked={}, rows=[], finished=False)

    def init(self, **options: Any) -> FakeWandb:
        self.asked = options
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.rows.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_wandb_gets_every_row_and_the_config_of_the_run(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train(config(tmp_path / "run", cache, steps=2, wandb="lift"), progress=False)
    assert fake.asked["project"] == "lift"
    assert fake.asked["name"] == "run"
    assert fake.asked["config"]["kind"] == "train"
    assert [step for step, values in fake.rows if "training/loss" in values] == [1, 2]
    assert fake.finished


def test_without_its_client_wandb_is_refused_before_any_work(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"cache-pipeline\[wandb\]"):
        train(config(tmp_path / "run", cache, wandb="lift"), progress=False)
    assert not (tmp_path / "run").exists()
