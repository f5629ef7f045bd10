"""Runs a policy in the environment of its dataset and measures its success rate."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.cache.manifest import ACTIONS
from cache_pipeline.errors import CachePipelineError, ConfigError, counted, described
from cache_pipeline.files import check_output
from cache_pipeline.progress import Progress
from cache_pipeline.sim.config import RolloutConfig
from cache_pipeline.sim.env_args import EnvArgs, read_env_args
from cache_pipeline.sim.environment import Environment, Obs, Step
from cache_pipeline.sim.history import ObsHistory
from cache_pipeline.sim.results import ROLLOUT_JSON, Episode, RolloutResult, keep, result_file, settings_of, summarise
from cache_pipeline.sim.video import side_by_side, video_format, write_video

if TYPE_CHECKING:
    import torch

DEFAULT_HORIZON = 400
"""Default steps of an episode, as for most tasks of robomimic; the config or ``env_args`` override it."""
DEFAULT_FPS = 20


class ActingPolicy(Protocol):
    """Interface of a policy in a rollout, such as ``VisuomotorPolicy``."""

    @property
    def cameras(self) -> Mapping[str, tuple[int, ...]]:
        """rgb obs key → (H, W) or (H, W, 3) of its images."""

    @property
    def low_dim(self) -> Mapping[str, tuple[int, ...]]:
        """Low-dim key → shape of one row."""

    @property
    def obs_horizon(self) -> int:
        """To."""

    @property
    def env_args(self) -> Mapping[str, Any] | None:
        """Value in the dataset of the policy, or None."""

    @property
    def render_flags(self) -> Mapping[str, Any] | None:
        """Value in the dataset of the policy, or None."""

    def act(self, obs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns actions (1, Ta, A) in dataset units; the first one belongs to the last obs.

        Args:
            obs: each camera uint8 (1, To, H, W, 3), each low-dim key float32 (1, To, d).
        """


class Simulation(Protocol):
    """Interface of an environment in an episode."""

    def reset(self, seed: int) -> Obs: ...

    def step(self, action: NDArray) -> Step: ...


def rollout(config: RolloutConfig, *, progress: bool = True, policy: ActingPolicy | None = None) -> RolloutResult:
    """Runs ``policy``, or that of ``config.run``, for ``config.episodes`` episodes.

    Raises:
        ConfigError: no ``env_args``; an obs of the policy is missing in the environment; or an output file exists
            already.
        CheckpointError: the run cannot be loaded.
        MissingExtraError, OpenGLError: the simulation cannot run on this machine.
    """
    started = time.monotonic()
    device = _device(config.device)
    check_outputs(config)
    settings = settings_of(config) if config.run.is_dir() else None  # the run's best checkpoint may change meanwhile
    if policy is None:
        from cache_pipeline.runs.policy import load_policy

        policy = load_policy(config.run, device, encoder=config.encoder)
    environment = choose_environment(config, policy)
    cameras = {name: (shape[0], shape[1]) for name, shape in policy.cameras.items()}
    kwargs = environment.env_args.get("env_kwargs", {})
    horizon = config.horizon or kwargs.get("horizon") or DEFAULT_HORIZON
    records: list[Episode] = []
    with ExitStack() as stack, _finished_videos_told(records, config.video):
        env = stack.enter_context(Environment.from_env_args(environment.env_args, cameras, environment.render_flags))
        bar = stack.enter_context(Progress("rollout", config.episodes, "episodes")) if progress else None
        for index in range(config.episodes):
            film: list[NDArray[np.uint8]] | None = None
            if config.video is not None and index < config.videos and cameras:
                film = []
            seed = episode_seed(config.seed, index)
            with _seeded(seed, device):
                episode = run_episode(
                    env,
                    policy,
                    seed=seed,
                    horizon=horizon,
                    action_steps=config.action_steps,
                    device=device,
                    film=film,
                )
            if film and config.video is not None:
                file = video_file(config.video, index, episode.success)
                fps = round(kwargs.get("control_freq", DEFAULT_FPS))
                written = write_video(file, film, fps, overwrite=config.overwrite)
                episode = episode._replace(video=str(written))
            records.append(episode)
            if bar is not None:
                bar.advance(successes=sum(record.success for record in records))
    result = summarise(records, time.monotonic() - started)
    if settings is not None:
        keep(result, config, settings)
    return result


@contextmanager
def _finished_videos_told(records: Sequence[Episode], folder: Path | None) -> Iterator[None]:
    """Adds the finished videos to the message of a full disk or an interrupt; they stay, so a rerun must replace them.

    Args:
        records: the episodes so far.
    """
    try:
        yield
    except (OSError, KeyboardInterrupt) as error:
        count = sum(record.video is not None for record in records)
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


def choose_environment(config: RolloutConfig, policy: ActingPolicy) -> EnvArgs:
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
            "takes the actions of the key actions; give --env-args FILE with a controller for these actions"
        )
    if policy.env_args is None:
        raise ConfigError(
            f"the dataset of {config.run} has no env_args, so its environment is unknown; "
            "give --env-args FILE: a JSON file, or a dataset with env_args"
        )
    return EnvArgs(dict(policy.env_args), flags)


def run_episode(
    env: Simulation,
    policy: ActingPolicy,
    *,
    seed: int,
    horizon: int,
    action_steps: int | None = None,
    device: str = "cpu",
    film: list[NDArray[np.uint8]] | None = None,
) -> Episode:
    """Runs one episode until success or ``horizon`` steps; the policy runs every ``action_steps`` steps.

    Args:
        film: called with the images of every step, the policy's cameras side by side.
    """
    started = time.monotonic()
    cameras = tuple(policy.cameras)
    history = ObsHistory((*cameras, *policy.low_dim), policy.obs_horizon)
    if hasattr(policy, "start_episode"):
        policy.start_episode()
    obs = env.reset(seed)
    history.start(obs)
    chunk: list[NDArray] = []
    steps, success = 0, False
    while steps < horizon and not success:
        if film is not None:
            film.append(side_by_side(obs, cameras))
        if not chunk:
            actions = ask(policy, history, device)
            chunk = list(actions[: action_steps or math.ceil(len(actions) / 2)])
        obs, _, success = env.step(chunk.pop(0))
        history.add(obs)
        steps += 1
    if film is not None:
        film.append(side_by_side(obs, cameras))
    return Episode(seed, success, steps, time.monotonic() - started)


def ask(policy: ActingPolicy, history: ObsHistory, device: str) -> NDArray[np.float64]:
    """Returns the policy's chunk (Ta, A) for the last obs."""
    import torch

    obs = {}
    for key, value in history.stack().items():
        tensor = torch.from_numpy(value)
        obs[key] = (tensor if key in policy.cameras else tensor.float()).to(device)
    with torch.no_grad():
        actions = policy.act(obs)
    assert actions.shape[:-2] == (1,), actions.shape
    return np.asarray(actions[0].double().cpu().numpy())


def episode_seed(seed: int, index: int) -> int:
    """Returns the environment's seed of episode ``index``."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


@contextmanager
def _seeded(seed: int, device: str) -> Iterator[None]:
    """Seeds torch's generator inside the block and restores the caller's random state."""
    import torch

    with torch.random.fork_rng([device] if device.startswith("cuda") else []):
        torch.manual_seed(seed)
        yield


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"
