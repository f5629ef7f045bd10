"""The last lines of a run."""

import doctest
from pathlib import Path

from cache_pipeline.runs.checkpoint import Best
from cache_pipeline.training.data import source
from cache_pipeline.training.data.source import source_in_words
from cache_pipeline.training.journal import START_ERROR
from cache_pipeline.training.loop import LoopResult
from cache_pipeline.training.result import TrainResult

RUN = Path("runs/tuned")
LOOP = LoopResult(2, 5.0, 0.4, 1.0, 0.9, RUN / "checkpoints/step_0000002", "live+live")
METRICS = {"validation/action_mse": 0.3, "validation/mean_action_mse": 0.5, START_ERROR: 0.2}


def test_a_fine_tuning_that_did_not_help_names_the_checkpoint_that_acts():
    lines = TrainResult.of(RUN, LOOP, METRICS, Best("step_0000000", 0, 0.2)).lines()
    assert any("did NOT help" in line for line in lines)
    assert lines[-2:] == [
        "best checkpoint runs/tuned/checkpoints/step_0000000: rollout, export and report use it",
        "latest checkpoint runs/tuned/checkpoints/step_0000002: --resume continues from it",
    ]


def test_one_checkpoint_is_named_once():
    result = TrainResult.of(RUN, LOOP, METRICS, Best("step_0000002", 2, 0.3))
    assert result.lines()[-1] == "checkpoint runs/tuned/checkpoints/step_0000002"
    assert result.to_json()["best_checkpoint"] == result.to_json()["checkpoint"] == str(LOOP.checkpoint)
    assert TrainResult.of(RUN, LOOP, {}).to_json()["best_checkpoint"] is None


def test_the_source_is_said_in_words():
    assert doctest.testmod(source).failed == 0
    assert TrainResult.of(RUN, LOOP, {}).lines()[0].endswith("(0.4 steps/s; frames encoded at every step)")
    assert TrainResult.of(RUN, LOOP, {}).to_json()["source"] == "live+live"
    assert source_in_words("resident+live") == "cached features held in memory, then frames encoded at every step"
    assert source_in_words("streamed+streamed+live").count("then") == 1
