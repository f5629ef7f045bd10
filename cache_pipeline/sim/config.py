"""Options of ``rollout``. A field with an ``Option`` is also an option of the command."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cache_pipeline.errors import OptionError
from cache_pipeline.options import DATA, LARGEST, OUTPUT, RUNNING, Option, check


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Options of ``rollout``."""

    run: Path
    """A run folder or one of its checkpoints."""
    episodes: Annotated[int, Option("Episodes, one seed each.", RUNNING, least=1)] = 20
    seed: Annotated[int, Option("Seed of everything that is random.", RUNNING, least=0, most=LARGEST)] = 0
    """Episode i depends only on (seed, i)."""
    horizon: Annotated[int | None, Option("Most steps of an episode.", RUNNING, least=1)] = None
    """Largest number of steps of an episode; default: the horizon of ``env_args`` or of the environment, else 400."""
    action_steps: Annotated[int | None, Option("Steps of each action chunk to execute.", RUNNING, least=1)] = None
    """Actions of each chunk that are executed before the policy runs again; default: half of the chunk."""
    workers: Annotated[int, Option("Processes, each with a simulation; the result is the same.", RUNNING, least=1)] = 1
    """1: the simulation runs in this process."""
    device: Annotated[str, Option("auto, cpu or cuda:0.", RUNNING)] = "auto"
    env: Annotated[str | None, Option("FILE.py:make, a gymnasium environment; it runs only if named here.", DATA)] = (
        None
    )
    """Factory of an environment with gymnasium's interface, ``module:make`` or ``file.py:make``; see
    ``sim/custom.py``. It replaces the environment of the dataset."""
    env_args: Annotated[Path | None, Option("JSON of the environment, for datasets without one.", DATA)] = None
    """JSON file or dataset with ``env_args``; overrides those of the run's dataset."""
    encoder: Annotated[
        str | None,
        Option("The factory that made the encoder, if any; it runs only if it is named here.", DATA),
    ] = None
    """Factory of the run's custom encoder, ``file.py:factory``. A factory runs only if it is named here."""
    video: Annotated[Path | None, Option("Folder for videos.", OUTPUT)] = None
    """Folder for one video per episode, the cameras side by side."""
    videos: Annotated[int, Option("Episodes to record, with --video.", OUTPUT, least=1)] = 3
    """Number of episodes that are filmed, from the first one on."""
    overwrite: Annotated[bool, Option("Replace existing videos.", OUTPUT)] = False

    def __post_init__(self) -> None:
        check(self)
        if self.env is not None and self.env_args is not None:
            raise OptionError("env makes the environment, so env_args has no effect; give one of the two")
