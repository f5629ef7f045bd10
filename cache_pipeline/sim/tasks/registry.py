"""The tasks that ``collect`` knows."""

from __future__ import annotations

from cache_pipeline.sim.tasks.lift import LIFT
from cache_pipeline.sim.tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (LIFT,)}
