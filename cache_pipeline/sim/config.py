"""Options of ``rollout``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cache_pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Options of ``rollout``."""

    run: Path
    """A run folder or one of its checkpoints."""
    episodes: int = 20
    seed: int = 0
    """The initial state of episode i depends only on (seed, i)."""
    horizon: int | None = None
    """Largest number of steps of an episode; default: the horizon of ``env_args``, else 400."""
    action_steps: int | None = None
    """Actions of each chunk that are executed before the policy runs again; default: half of the chunk."""
    video: Path | None = None
    """Folder for one video per episode, the cameras side by side."""
    videos: int = 3
    """Number of episodes that are filmed, from the first one on."""
    overwrite: bool = False
    """Replace existing videos."""
    env_args: Path | None = None
    """JSON file or dataset with ``env_args``; overrides those of the run's dataset."""
    encoder: str | None = None
    """Factory of the run's custom encoder, ``file.py:factory``. A factory runs only if it is named here."""
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("episodes", "horizon", "action_steps", "videos"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; give at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; give 0 or more")
