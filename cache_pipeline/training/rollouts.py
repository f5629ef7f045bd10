"""Rollouts during training: ``--rollout-every``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cache_pipeline.cache.manifest import ACTIONS
from cache_pipeline.encoders.frozen import FrozenEncoder, frozen_encoders
from cache_pipeline.errors import ConfigError
from cache_pipeline.sim.config import RolloutConfig
from cache_pipeline.sim.results import RolloutResult
from cache_pipeline.sim.rollout import open_rollouts
from cache_pipeline.training.session import Session

FIRST_EPISODE = 1_000_000
"""Number of the first episode. ``rollout`` counts from 0: other episodes judge the best checkpoint than choose it."""


@contextmanager
def rollouts_of(session: Session, run: Path) -> Iterator[Callable[[], RolloutResult]]:
    """Opens ``rollout_env``, or the environment of the run's dataset.

    Each call of the result runs the same episodes with the current weights. It draws no random number of training.

    Raises:
        ConfigError: there is no environment, or it lacks an obs.
        MissingExtraError, OpenGLError: the simulation cannot run on this machine.
    """
    policy: Any = session.policy
    data, config, saving = session.record.data, session.config, session.config.saving
    if saving.rollout_env is None and (data.env_args is None or data.action_keys != ACTIONS):
        lacking = "have no env_args" if data.env_args is None else f"give the actions {', '.join(data.action_keys)}"
        raise ConfigError(
            f"--rollout-every needs an environment, but the data {lacking}; give --rollout-env FILE.py:make, or leave "
            "it out and measure the run with rollout --env-args FILE or --env FILE.py:make"
        )
    policy.env_args, policy.render_flags, policy.action_keys = data.env_args, data.render_flags, data.action_keys
    options = RolloutConfig(
        run=run,
        episodes=saving.rollout_episodes,
        seed=config.seed,
        workers=saving.rollout_workers,
        env=saving.rollout_env,
    )
    fast: dict[str, FrozenEncoder] = {}
    if not session.unfreezing:  # the encoders stay as they are now
        fast = frozen_encoders(policy.encoders, policy.preprocessing, session.device, "fp32")
    with open_rollouts(options, policy, session.device, first=FIRST_EPISODE) as roll:

        def rolled() -> RolloutResult:
            trunks = policy.frozen_trunks
            policy.eval()
            policy.frozen_trunks = trunks or fast
            try:
                return roll()
            finally:
                policy.frozen_trunks = trunks
                policy.train()

        yield rolled
