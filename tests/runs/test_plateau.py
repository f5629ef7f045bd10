from __future__ import annotations

import csv
from pathlib import Path

import pytest
from training_runs import config

from cache_pipeline.runs.metrics import COLUMNS
from cache_pipeline.runs.plateau import has_flattened, plateau_notes
from cache_pipeline.training.train import train


@pytest.mark.parametrize(
    ("errors", "flat"),
    [
        ([1.0, 0.5, 0.3, 0.2, 0.1, 0.05], False),
        ([1.0, 0.5, 0.3, 0.2, 0.2, 0.199], True),
        ([1.0, 0.5, 0.3, 0.2, 0.21, 0.195], False),
        ([0.2, 0.1, 0.1, 0.3, 0.4, 0.5], True),
        ([0.2, 0.2, 0.2, 0.2, 0.2], False),
        ([], False),
    ],
)
def test_an_error_has_flattened_when_its_last_third_brings_less_than_two_percent(
    errors: list[float], flat: bool
) -> None:
    assert has_flattened(errors) is flat


def test_a_flat_run_ends_with_the_command_that_unfreezes_and_a_falling_one_without(cache: Path, tmp_path: Path) -> None:
    result = train(config(tmp_path / "run", cache, steps=2), progress=False)
    assert result.notes == ()
    for errors, words in ((["0.5"] * 6, True), ([str(0.9**n) for n in range(9)], False)):
        with (result.run / "metrics.csv").open("w", newline="") as file:
            rows = csv.DictWriter(file, COLUMNS, restval="")
            rows.writeheader()
            rows.writerows({"step": n, "validation/action_mse": error} for n, error in enumerate(errors))
        notes = "\n".join(plateau_notes(result.run))
        assert (f"finetune --live-encoder --checkpoint {result.run} --unfreeze layer4" in notes) is words
        assert ("--emb-dim 32" in notes) is words
        assert ("--pooling spatial_softmax" in notes) is words  # the cache holds avgpool features
