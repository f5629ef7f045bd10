"""The last lines of a run."""

import doctest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cache_pipeline.runs.checkpoint import Best
from cache_pipeline.training.data import source
from cache_pipeline.training.data.source import source_in_words
from cache_pipeline.training.journal import START_ERROR, Carried
from cache_pipeline.training.result import TrainResult

RUN = Path("runs/tuned")
LATEST = RUN / "checkpoints/step_0000002"
METRICS = {"validation/action_mse": 0.3, "validation/mean_action_mse": 0.5, START_ERROR: 0.2}


def result(best: Best | None = None, **metrics: float) -> TrainResult:
    journal: Any = SimpleNamespace(carried=Carried(2, 5.0, 1.0, 0.9), metrics=metrics, checkpoint=LATEST)
    return TrainResult.of(RUN, journal, "live+live", best)


def test_a_fine_tuning_that_did_not_help_names_the_checkpoint_that_acts():
    lines = result(Best("step_0000000", 0, 0.2), **METRICS).lines()
    assert any("did NOT help" in line for line in lines)
    assert lines[-2:] == [
        "best checkpoint runs/tuned/checkpoints/step_0000000: rollout, export and report use it",
        "latest checkpoint runs/tuned/checkpoints/step_0000002: --resume continues from it",
    ]


def test_one_checkpoint_is_named_once():
    one = result(Best("step_0000002", 2, 0.3), **METRICS)
    assert one.lines()[-1] == "checkpoint runs/tuned/checkpoints/step_0000002"
    assert one.to_json()["best_checkpoint"] == one.to_json()["checkpoint"] == str(LATEST)
    assert result().to_json()["best_checkpoint"] is None


def test_the_source_is_said_in_words():
    assert doctest.testmod(source).failed == 0
    assert result().lines()[0].endswith("(0.4 steps/s; frames encoded at every step)")
    assert result().to_json()["source"] == "live+live"
    assert source_in_words("resident+live") == "cached features held in memory, then frames encoded at every step"
    assert source_in_words("streamed+streamed+live").count("then") == 1
