"""One scripted expert per task."""

TASK_NAMES = ("Lift", "Stack", "PickPlaceCan", "Door", "NutAssemblySquare")
"""The keys of ``registry.TASKS``, for ``--help``, which does not import NumPy."""
