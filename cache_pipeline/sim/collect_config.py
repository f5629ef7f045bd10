"""Options of ``collect`` and of ``collect --from-states``; imports no simulator."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from cache_pipeline.errors import ConfigError, OptionError, available
from cache_pipeline.options import DATA, LARGEST, MOST_PIXELS, OUTPUT, RUNNING, Option, check, names
from cache_pipeline.sim.tasks import TASK_NAMES

IMAGE_SUFFIX = "_image"
FAST_RENDER_FLAGS = {"shadow": False, "reflection": False}
"""Flags that are off by default: software rendering is then about three times as fast."""
SWITCH = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}


def switches(texts: list[str]) -> dict[str, bool]:
    """Reads ``shadow=on`` and the like; raises OptionError."""
    found: dict[str, bool] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not name or value.lower() not in SWITCH:
            raise OptionError(f"render flag {text!r} is not NAME=on or NAME=off; give for instance shadow=on")
        if name in found:
            raise OptionError(f"render flag {name} is given twice, but only one counts; give it once")
        found[name] = SWITCH[value.lower()]
    return found


@dataclass(frozen=True, kw_only=True)
class FileConfig:
    """The file to write, its images, and the processes that make them."""

    out: Annotated[Path, Option("The HDF5 file to write.", OUTPUT)]
    """It is written atomically."""
    cameras: Annotated[
        tuple[str, ...],
        Option("Cameras, comma-separated; agentview and the wrist by default.", DATA, typed=str, parse=names),
    ] = ("agentview_image", "robot0_eye_in_hand_image")
    """rgb obs keys: robosuite's camera names with ``_image``."""
    image_size: Annotated[
        int, Option("Height and width of every image in pixels.", DATA, least=8, most=MOST_PIXELS)
    ] = 84
    render_flags: Annotated[
        dict[str, bool],
        Option(
            "MuJoCo scene flag NAME=on or NAME=off, such as shadow=on; may be repeated.",
            DATA,
            "--render-flag",
            typed=list[str],
            parse=switches,
        ),
    ] = field(default_factory=dict)
    """MuJoCo scene flags that differ from the defaults. The file records all flags; rollouts render with them."""
    gzip_level: int = 9
    frames_per_chunk: int = 16
    workers: Annotated[
        int, Option("Processes that simulate, each with a task of its own.", RUNNING, least=1, most=1024)
    ] = 1
    """The content of the file does not depend on it."""
    overwrite: Annotated[bool, Option("Replace existing output once the new one is complete.", OUTPUT)] = False

    def __post_init__(self) -> None:
        check(self)
        if self.frames_per_chunk < 1:
            raise ConfigError(f"frames_per_chunk is {self.frames_per_chunk}; give at least 1")
        if not 0 <= self.gzip_level <= 9:
            raise ConfigError(f"gzip_level is {self.gzip_level}; give 0 to 9")
        for camera in self.cameras:
            if not camera.endswith(IMAGE_SUFFIX):
                raise ConfigError(f"camera {camera!r} is not an rgb obs key; did you mean {camera}{IMAGE_SUFFIX}?")

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Camera → (height, width)."""
        return dict.fromkeys(self.cameras, (self.image_size, self.image_size))


@dataclass(frozen=True, kw_only=True)
class CollectConfig(FileConfig):
    """Options of ``collect``."""

    task: Annotated[str, Option(f"Task with a scripted expert: {', '.join(TASK_NAMES)}.", DATA)] = "Lift"
    demos: Annotated[int, Option("Successful demos to collect.", DATA, least=1)] = 100
    seed: Annotated[int, Option("Seed of everything that is random.", RUNNING, least=0, most=LARGEST)] = 0
    horizon: Annotated[
        int | None, Option("Most steps of an attempt; by default as many as the task says.", DATA, least=1)
    ] = None
    """An attempt that takes more steps has failed."""
    noise: Annotated[float, Option("Deviation of the expert's noise over the action limits.", DATA, least=0)] = 0.1
    """Standard deviation of Gaussian noise on the expert's displacement, as a fraction of the action limits."""
    valid_fraction: Annotated[
        float, Option("Fraction of the demos in the filter key valid.", DATA, least=0, most=1)
    ] = 0.1
    """At least one demo if it is above 0 and there are two or more demos."""
    next_obs: Annotated[
        bool, Option("Also write the obs after each step, which robomimic's offline RL reads from the file.", OUTPUT)
    ] = False
    """The images then take twice the space. Training here needs none: the next row of a demo is the next obs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        from cache_pipeline.sim.tasks.registry import TASKS

        if self.task not in TASKS:
            raise ConfigError(f"there is no scripted expert for the task {self.task!r}; {available(TASKS, self.task)}")
        if self.valid_fraction == 1:
            raise OptionError("valid_fraction is 1, which leaves no demo to train on; give less than 1")

    @property
    def flags(self) -> dict[str, bool]:
        """All render flags that the file records."""
        return {**FAST_RENDER_FLAGS, **self.render_flags}


@dataclass(frozen=True, kw_only=True)
class RerenderConfig(FileConfig):
    """Options of ``collect --from-states``."""

    source: Path
    """A robomimic file with the simulator's states."""
    env_args: Annotated[
        Path | None, Option("env_args for a file of --from-states without them: a JSON file, or a dataset.", DATA)
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.cameras:
            raise ConfigError("no cameras are given; name at least one with --cameras")
