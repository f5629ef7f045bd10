"""The part of a run's page on rollouts: success over steps, results, and strips of frames of the videos."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from cache_pipeline.errors import counted
from cache_pipeline.files import read_json, typed
from cache_pipeline.progress import logger
from cache_pipeline.reports import plots
from cache_pipeline.reports.page import Page
from cache_pipeline.runs.checkpoint import CHECKPOINT_NAME, SUCCESS_RATE
from cache_pipeline.runs.metrics import read_metrics
from cache_pipeline.sim.results import ROLLOUTS, wilson_interval
from cache_pipeline.sim.video import read_frames

STRIP_FRAMES = 6
SHOWN_VIDEOS = 12
"""Videos of one result that are drawn; the others are only named."""


@dataclass(frozen=True)
class _Episode:
    success: bool | None = None
    steps: int | None = None
    video: str | None = None


@dataclass(frozen=True)
class _Result:
    """What the page shows of a result of ``rollout``."""

    episodes: int
    successes: int
    ci95: tuple[float, float]
    records: tuple[_Episode, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int | None:
        """The step of the checkpoint, if known."""
        name = str(self.settings.get("checkpoint"))
        return int(name.split("_")[1]) if CHECKPOINT_NAME.fullmatch(name) else None


def add_rollouts(page: Page, folder: Path, out: Path) -> None:
    """Adds the rollouts of a run to its page.

    Args:
        folder: the run.
        out: path of the page; links to videos begin at its folder.
    """
    results = dict(_results(folder))
    _success_over_steps(page, folder, results)
    for name, result in results.items():
        _result(page, name, result, out)


def _results(folder: Path) -> Iterator[tuple[str, _Result]]:
    for path in sorted((folder / ROLLOUTS).glob("*.json")):
        try:
            yield path.stem, typed(read_json(path), _Result)
        except (OSError, ValueError, RecursionError) as error:
            logger.warning("%s is not shown: %s", path, error)


def success_rates(folder: Path) -> tuple[list[plots.Rate], list[plots.Rate]]:
    """Returns the success rates of a run that were measured during training, and those of the command ``rollout``."""
    return _rates(folder, dict(_results(folder)))


def _rates(folder: Path, results: dict[str, _Result]) -> tuple[list[plots.Rate], list[plots.Rate]]:
    training = [
        plots.Rate(
            row["step"], row[SUCCESS_RATE], *wilson_interval(round(row[SUCCESS_RATE] * episodes), episodes), episodes
        )
        for row in read_metrics(folder)
        if row.get(SUCCESS_RATE) is not None and (episodes := int(row["rollout/episodes"] or 0)) > 0
    ]
    later = [
        plots.Rate(result.step, result.successes / result.episodes, *result.ci95, result.episodes)
        for result in results.values()
        if result.step is not None and 0 <= result.successes <= result.episodes and result.episodes > 0
    ]
    return training, later


def _success_over_steps(page: Page, folder: Path, results: dict[str, _Result]) -> None:
    training, later = _rates(folder, results)
    if not training and not later:
        return
    page.heading("Success in simulation")
    page.text("Share of episodes that succeeded, over the training steps of the policy. Bars are 95 % intervals.")
    page.picture(plots.success_rates(training, later), "success rate over training steps")


def _result(page: Page, name: str, result: _Result, out: Path) -> None:
    low, high = result.ci95
    page.heading(f"Rollouts {name}")
    if settings := {key: value for key, value in result.settings.items() if value is not None}:
        page.text(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in settings.items()))
    facts = [
        (f"{result.successes} of {result.episodes}", "episodes succeeded"),
        (f"{low:.0%} – {high:.0%}", "95 % interval of the rate"),
    ]
    lengths = [episode.steps for episode in result.records if episode.success and episode.steps is not None]
    if lengths:
        facts.append((f"{median(lengths):g}", "steps of a success (median)"))
    page.facts(facts)
    filmed = [
        (number, episode, Path(episode.video))
        for number, episode in enumerate(result.records)
        # isfile also for a path that no file system can hold
        if episode.video is not None and os.path.isfile(episode.video)
    ]
    for number, episode, video in filmed[:SHOWN_VIDEOS]:
        _video(page, f"episode {number}", episode, video, out)
    if len(filmed) > SHOWN_VIDEOS:
        others = counted(len(filmed) - SHOWN_VIDEOS, "other video")
        page.text(f"{others} in {filmed[-1][2].parent}")


def _video(page: Page, name: str, episode: _Episode, video: Path, out: Path) -> None:
    ended = {True: "success", False: "failure", None: ""}[episode.success]
    length = "" if episode.steps is None else f"after {counted(episode.steps, 'step')}"
    caption = f"{name}: {ended} {length}".rstrip(": ")
    link = os.path.relpath(video.absolute(), out.absolute().parent)
    try:
        frames = read_frames(video, STRIP_FRAMES)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        logger.info("%s is linked without a strip of frames: %s", video, error)
    else:
        page.picture(plots.contact_sheet({caption: frames}), caption)
    page.link(f"{caption}; play {video.name}", link)
