"""Part i of n of an extraction: which jobs it makes, and where its number comes from."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from cache_pipeline.errors import OptionError

AUTO = "auto"
Environment = Mapping[str, str]


class Part(NamedTuple):
    """One of ``total`` parts, numbered from 1.

    Every part numbers all jobs of the cache in the same way, done or not, and makes each ``total``-th of them. So the
    parts need not talk to each other.
    """

    number: int
    total: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Reads ``3/16``, or ``auto`` from the environment of a job scheduler; raises OptionError."""
        if text.strip() == AUTO:
            return part_of_job(os.environ)
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
        if match is None:
            raise OptionError(f"--part {text} is not a part; give its number and how many there are, such as 3/16")
        number, count = int(match[1]), int(match[2])
        if not 1 <= number <= count:
            raise OptionError(f"--part {text}: parts are numbered from 1 to their count, such as 1/16 to 16/16")
        return cls(number, count)

    def owns(self, job: int) -> bool:
        """Whether this part makes the job of this number, counted from 0."""
        return job % self.total == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"


def part_of_job(environment: Environment) -> Part:
    """Returns the part that a job scheduler has given to this process.

    Raises:
        OptionError: the environment names no part.
    """
    for read in (_slurm, _kubernetes, _torchrun):
        part = read(environment)
        if part is not None:
            return part
    raise OptionError(
        "--part auto finds no part in the environment: SLURM_ARRAY_TASK_ID, JOB_COMPLETION_INDEX with JOB_COMPLETIONS, "
        "or RANK with WORLD_SIZE; give it as 3/16"
    )


def _slurm(environment: Environment) -> Part | None:
    """A Slurm array without gaps: tasks ``--array=0-15`` or ``--array=1-16``."""
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return None
    task, first, count = (_number(environment, f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN", "COUNT"))
    step = _number(environment, "SLURM_ARRAY_TASK_STEP") if "SLURM_ARRAY_TASK_STEP" in environment else 1
    return _checked((task - first) // max(step, 1), count, "SLURM_ARRAY_TASK_ID")


def _kubernetes(environment: Environment) -> Part | None:
    """An indexed job; Kubernetes does not tell ``completions``, so the job's template must set JOB_COMPLETIONS."""
    if "JOB_COMPLETION_INDEX" not in environment:
        return None
    return _checked(
        _number(environment, "JOB_COMPLETION_INDEX"), _number(environment, "JOB_COMPLETIONS"), "JOB_COMPLETION_INDEX"
    )


def _torchrun(environment: Environment) -> Part | None:
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    return _checked(_number(environment, "RANK"), _number(environment, "WORLD_SIZE"), "RANK")


def _number(environment: Environment, name: str) -> int:
    text = environment.get(name)
    if text is None:
        raise OptionError(f"--part auto: {name} is not set; set it in the job's template, or give the part as 3/16")
    if not text.strip().isdecimal():
        raise OptionError(f"--part auto: {name} is {text!r}, not a number; give the part as 3/16")
    return int(text)


def _checked(index: int, count: int, name: str) -> Part:
    if not 0 <= index < count:
        raise OptionError(f"--part auto: {name} is outside the {count} parts; give the part as 3/16")
    return Part(index + 1, count)
