"""The tasks that ``collect`` knows."""

from __future__ import annotations

from cache_pipeline.sim.tasks.door import DOOR
from cache_pipeline.sim.tasks.lift import LIFT
from cache_pipeline.sim.tasks.nut_assembly_square import NUT_ASSEMBLY_SQUARE
from cache_pipeline.sim.tasks.pick_place_can import PICK_PLACE_CAN
from cache_pipeline.sim.tasks.stack import STACK
from cache_pipeline.sim.tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (LIFT, STACK, PICK_PLACE_CAN, DOOR, NUT_ASSEMBLY_SQUARE)}
