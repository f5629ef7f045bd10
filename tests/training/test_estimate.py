from __future__ import annotations

import pytest

from cache_pipeline.training import loop


def estimates(seconds_per_step: float, stop: int, monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """Step → what is said after it, for a first step that takes a minute."""
    now = 0.0
    monkeypatch.setattr(loop.time, "monotonic", lambda: now)
    estimate, said = loop.Estimate(stop), {}
    for step in range(1, stop + 1):
        now += 60.0 if step == 1 else seconds_per_step
        if (line := estimate.after(step)) is not None:
            said[step] = line
    return said


def test_long_training_is_estimated_once_without_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert estimates(2.0, 1804, monkeypatch) == {4: "0.5 steps/s: the remaining 1800 steps take about 60 min"}


def test_nothing_is_said_of_training_that_ends_within_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    assert estimates(2.0, 20, monkeypatch) == {}
