"""Runs a policy in the environment of its dataset, or in one of the user's own, and measures its success rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from cache_pipeline.cache.manifest import ACTIONS
from cache_pipeline.errors import CachePipelineError, ConfigError, counted, described
from cache_pipeline.files import check_output
from cache_pipeline.progress import Progress
from cache_pipeline.sim.config import RolloutConfig
from cache_pipeline.sim.custom import FactoryOpening
from cache_pipeline.sim.env_args import EnvArgs, read_env_args
from cache_pipeline.sim.results import ROLLOUT_JSON, Episode, RolloutResult, keep, result_file, settings_of, summarise
from cache_pipeline.sim.simulation import Opening, RobosuiteOpening
from cache_pipeline.sim.video import video_format, write_video
from cache_pipeline.sim.workers import opened

if TYPE_CHECKING:
    import torch

    from cache_pipeline.sim.acting import ActingPolicy
    from cache_pipeline.sim.episodes import Film

DEFAULT_FPS = 20


class Rollouts(Protocol):
    """Runs the episodes of a config with the current weights of a policy."""

    def __call__(self, told: Callable[[int, Episode], None] | None = None) -> RolloutResult:
        """Calls ``told`` with the number and the result of each episode that has ended."""


def rollout(config: RolloutConfig, *, progress: bool = True, policy: ActingPolicy | None = None) -> RolloutResult:
    """Runs ``policy``, or that of ``config.run``, for ``config.episodes`` episodes.

    The result of episode i (success, steps, actions) depends on the policy, ``config.seed`` and i alone: not on
    ``config.workers``, nor on the episodes that run beside it. See ``sim/acting.py`` for what that rests on.

    Raises:
        ConfigError: no ``env_args``; an obs of the policy is missing in the environment; or an output file exists
            already.
        CheckpointError: the run cannot be loaded.
        MissingExtraError, OpenGLError: the simulation cannot run on this machine.
        WorkerEndedError: the process of a simulation ended.
    """
    from cache_pipeline.sim.acting import on_fast_path

    started = time.monotonic()
    device = _device(config.device)
    check_outputs(config)
    settings = settings_of(config) if config.run.is_dir() else None  # the run's best checkpoint may change meanwhile
    if policy is None:
        from cache_pipeline.runs.policy import load_policy

        policy = on_fast_path(load_policy(config.run, device, encoder=config.encoder))
    records: dict[int, Episode] = {}
    with ExitStack() as stack, _finished_videos_told(records, config.video):
        run = stack.enter_context(open_rollouts(config, policy, device))
        bar = stack.enter_context(Progress("rollout", config.episodes, "episodes")) if progress else None

        def finished(index: int, episode: Episode) -> None:
            records[index] = episode
            if bar is not None:
                bar.advance(successes=sum(record.success for record in records.values()))

        result = run(finished)._replace(seconds=time.monotonic() - started)
    if settings is not None:
        keep(result, config, settings)
    return result


@contextmanager
def _finished_videos_told(records: Mapping[int, Episode], folder: Path | None) -> Iterator[None]:
    """Adds the finished videos to the message of a full disk or an interrupt; they stay, so a rerun must replace them.

    Args:
        records: the finished episodes.
    """
    try:
        yield
    except (OSError, KeyboardInterrupt) as error:
        count = sum(record.video is not None for record in records.values())
        if not count:
            raise
        again = "run the same command again with --overwrite"
        stay = f"{counted(count, 'finished video')} {'stay' if count > 1 else 'stays'} in {folder}"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"no result was saved, and {stay}; {again}") from None
        raise CachePipelineError(f"{described(error, again)}; {stay}") from error


def video_file(folder: Path, index: int, success: bool) -> Path:
    """Returns the path of an episode's video, without suffix."""
    return folder / f"episode_{index:03d}_{'success' if success else 'failure'}"


def check_outputs(config: RolloutConfig) -> None:
    """Raises ConfigError if an output file exists and may not be replaced. Changes nothing."""
    if config.run.is_dir():
        check_output(result_file(config, settings_of(config)), ROLLOUT_JSON, overwrite=True)
    if config.video is None:
        return
    suffix, kind = video_format()
    for index in range(min(config.videos, config.episodes)):
        for success in (True, False):
            file = video_file(config.video, index, success).with_suffix(suffix)
            check_output(file, kind, overwrite=config.overwrite)


@contextmanager
def open_rollouts(
    config: RolloutConfig, policy: ActingPolicy, device: str | torch.device, *, first: int = 0
) -> Iterator[Rollouts]:
    """Opens the environment of a policy; each call of the result runs the episodes of ``config``.

    Args:
        first: number of the first episode; the initial state of an episode depends on its number and the seed.
    """
    from cache_pipeline.sim.acting import Actor
    from cache_pipeline.sim.episodes import Plan, run_episodes

    place = choose_environment(config, policy)
    actor = Actor(policy, device)
    if config.workers > 1 and actor.one_at_a_time:
        raise ConfigError("the policy has one state for all episodes, so they run one after another; give 1 worker")
    seeds = [episode_seed(config.seed, first + index) for index in range(config.episodes)]
    plan = Plan(seeds, place.horizon, config.action_steps, 0 if config.video is None else config.videos)
    with opened(place.opening, actor.keys, min(config.workers, config.episodes)) as places:

        def run(told: Callable[[int, Episode], None] | None = None) -> RolloutResult:
            started, records = time.monotonic(), {}

            def finished(index: int, episode: Episode, film: Film | None) -> None:
                if film and config.video is not None:
                    file = video_file(config.video, index, episode.success)
                    written = write_video(file, film, place.fps, overwrite=config.overwrite)
                    episode = episode._replace(video=str(written))
                records[index] = episode
                if told is not None:
                    told(index, episode)

            run_episodes(places, actor, plan, finished)
            return summarise([records[index] for index in range(config.episodes)], time.monotonic() - started)

        yield run


class Where(NamedTuple):
    """The environment of a rollout: how it is opened, its largest number of steps, and frames per second of a video."""

    opening: Opening
    horizon: int | None
    fps: int


def choose_environment(config: RolloutConfig, policy: ActingPolicy) -> Where:
    """Returns the environment of ``config.env`` or ``config.env_args``, else that of the policy's dataset."""
    cameras = {name: (shape[0], shape[1]) for name, shape in policy.cameras.items()}
    if config.env is not None:
        return Where(FactoryOpening(config.env, cameras, dict(policy.low_dim)), config.horizon, DEFAULT_FPS)
    chosen = choose_env_args(config, policy)
    kwargs = chosen.env_args.get("env_kwargs", {})
    opening = RobosuiteOpening(chosen.env_args, cameras, chosen.render_flags)
    return Where(opening, config.horizon or kwargs.get("horizon"), round(kwargs.get("control_freq", DEFAULT_FPS)))


def choose_env_args(config: RolloutConfig, policy: ActingPolicy) -> EnvArgs:
    """Returns the environment of ``config.env_args``, else of the policy's dataset; raises ConfigError without one.

    Render flags of the dataset take precedence, because the policy was trained on such images. The environment of a
    dataset takes its ``actions``; a policy of other actions needs an environment that the user names.
    """
    flags = None if policy.render_flags is None else dict(policy.render_flags)
    if config.env_args is not None:
        read = read_env_args(config.env_args)
        return EnvArgs(read.env_args, read.render_flags if flags is None else flags)
    keys = getattr(policy, "action_keys", ACTIONS)
    if keys != ACTIONS:
        raise ConfigError(
            f"{config.run} acts with the action key {', '.join(keys)}, but the environment of its dataset "
            "takes the actions of the key actions; give --env-args FILE with a controller for these actions, or --env"
        )
    if policy.env_args is None:
        raise ConfigError(
            f"the dataset of {config.run} has no env_args, so its environment is unknown; "
            "give --env-args FILE: a JSON file, or a dataset with env_args; or --env FILE.py:make"
        )
    return EnvArgs(dict(policy.env_args), flags)


def episode_seed(seed: int, index: int) -> int:
    """Returns the environment's seed of episode ``index``."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"
