"""Results of rollouts: success rate with its interval, and the files in ``RUN/rollouts/`` that ``report`` reads."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cache_pipeline.errors import counted
from cache_pipeline.files import FileKind, digest, finite, numbered, output_file, read_json, write_json
from cache_pipeline.progress import logger
from cache_pipeline.sim.config import RolloutConfig
from cache_pipeline.sim.env_args import read_env_args

ROLLOUTS = "rollouts"


def _is_result(path: Path) -> bool:
    value = read_json(path)
    return isinstance(value, dict) and {"episodes", "successes", "records"} <= set(value)


ROLLOUT_JSON = FileKind("a result that rollout wrote", _is_result)


class Episode(NamedTuple):
    """Result of one episode."""

    seed: int
    success: bool
    steps: int
    seconds: float
    video: str | None = None


class RolloutResult(NamedTuple):
    """Success rate of a policy; ``ci95`` is its 95 % Wilson interval."""

    episodes: int
    successes: int
    success_rate: float
    ci95: tuple[float, float]
    seconds: float
    records: tuple[Episode, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            **self._asdict(),
            "ci95": list(self.ci95),
            "records": [episode._asdict() for episode in self.records],
        }

    def lines(self) -> list[str]:
        """Returns the result as lines for a terminal."""
        low, high = self.ci95
        rate = f"{self.success_rate:.0%} (95% interval {low:.0%} to {high:.0%})"
        videos = [f"video: {episode.video}" for episode in self.records if episode.video]
        return [
            f"success: {self.successes} of {counted(self.episodes, 'episode')}, {rate}, in {self.seconds:.0f} s",
            *videos,
        ]


def summarise(records: list[Episode], seconds: float) -> RolloutResult:
    """Computes the success rate of the episodes."""
    successes = sum(record.success for record in records)
    rate = successes / len(records)
    return RolloutResult(
        len(records), successes, rate, wilson_interval(successes, len(records)), seconds, tuple(records)
    )


def wilson_interval(successes: int, episodes: int, z: float = 1.959964) -> tuple[float, float]:
    """Returns Wilson's score interval of a success rate (JASA 22, 1927), by default 95 %.

    Unlike ±z·σ, it has a width above 0 for 0 successes.
    """
    assert 0 <= successes <= episodes, (successes, episodes)
    rate = successes / episodes
    centre = rate + z**2 / (2 * episodes)
    spread = z * math.sqrt(rate * (1 - rate) / episodes + z**2 / (4 * episodes**2))
    scale = 1 + z**2 / episodes
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def keep(result: RolloutResult, config: RolloutConfig, settings: Mapping[str, Any]) -> Path:
    """Writes the result and its settings to ``RUN/rollouts/``, where ``report`` reads them; paths become absolute."""
    path = result_file(config, settings)
    videos = {episode.video: os.path.abspath(episode.video) for episode in result.records if episode.video is not None}
    records = [episode._replace(video=videos.get(episode.video or "")) for episode in result.records]
    result = result._replace(records=tuple(records))
    with output_file(path, ROLLOUT_JSON, overwrite=True) as partial:
        write_json(partial, finite({**result.to_json(), "settings": dict(settings)}))
    logger.info("result: %s", path)
    return path


def settings_of(config: RolloutConfig) -> dict[str, Any]:
    """Returns what decides the result of a rollout, beside the seed and the number of episodes."""
    from cache_pipeline.runs.checkpoint import find_checkpoint

    return {
        **({} if config.env is None else {"env": config.env}),
        "checkpoint": find_checkpoint(config.run)[1].resolve().name,
        "horizon": config.horizon,
        "action_steps": config.action_steps,
        "env_args": None if config.env_args is None else digest(repr(read_env_args(config.env_args)).encode()),
    }


def result_file(config: RolloutConfig, settings: Mapping[str, Any]) -> Path:
    """Returns the path of the result file: ``seed_<seed>_<episodes>.json``, or ``…_2.json`` and so on.

    A rollout with the same settings replaces its result; one with other settings gets the next free name.
    """
    from cache_pipeline.runs.checkpoint import find_checkpoint

    first = find_checkpoint(config.run)[0] / ROLLOUTS / f"seed_{config.seed}_{config.episodes}.json"
    return next(path for path in numbered(first) if not os.path.lexists(path) or _has(path, settings))


def _has(path: Path, settings: Mapping[str, Any]) -> bool:
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return False
    return isinstance(value, dict) and value.get("settings") == settings
