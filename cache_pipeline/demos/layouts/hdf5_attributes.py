"""Reads attributes of robomimic's HDF5 files: environment, counts, and the task in words."""

from __future__ import annotations

import json
from typing import Any

import h5py
import numpy as np

from cache_pipeline.hdf5 import READ_ERRORS

# Attributes of a demo or of ``data`` that hold the task in words; in JSON ones the task has this key.
TASK_ATTRIBUTES = ("task_description", "language_instruction", "lang")
TASK_JSON = {"ep_meta": "lang", "problem_info": "language_instruction"}


def task_text(group: h5py.Group) -> str | None:
    """Returns the task in words: LIBERO's ``problem_info``, RoboCasa's ``ep_meta``, or a plain attribute."""
    for name in TASK_ATTRIBUTES:
        if text := _words(_attribute(group, name)):
            return text
    for name, key in TASK_JSON.items():
        value = json_attribute(group, name, [])
        if text := _words((value or {}).get(key)):
            return text
    return None


def flipped_frames(group: h5py.Group) -> bool:
    """Whether frames were stored as OpenGL renders them, the lowest row first (``macros_image_convention``)."""
    return _words(_attribute(group, "macros_image_convention")) == "opengl"


def _attribute(group: h5py.Group, name: str) -> Any:
    try:
        return group.attrs.get(name)
    except READ_ERRORS:
        return None


def _words(value: Any) -> str:
    if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        value = "".join(value)  # LIBERO joins its instruction so
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return value.strip() if isinstance(value, str) else ""


def json_attribute(group: h5py.Group, name: str, notes: list[str]) -> dict[str, Any] | None:
    if name not in group.attrs:
        return None
    try:
        text = group.attrs[name]
        value = json.loads(text if isinstance(text, (str, bytes)) else str(text), parse_constant=_not_json)
    except (*READ_ERRORS, RecursionError) as error:
        notes.append(f"{name} is not JSON and is left out: {error}")
        return None
    if not isinstance(value, dict):
        notes.append(f"{name} is not a JSON object and is left out")
        return None
    return value


def _not_json(name: str) -> None:
    raise ValueError(f"it holds {name}, which JSON does not have")


def count_attribute(group: h5py.Group, name: str) -> tuple[int | None, bool]:
    """Returns a number of steps, None if it is absent or not a whole number, and whether it is there but is not one."""
    try:
        if name not in group.attrs:
            return None, False
        value = np.asarray(group.attrs[name])
        if value.size == 1 and value.dtype.kind in "iufb" and value.item() == (count := int(value.item())):
            return count, False
    except (*READ_ERRORS, OverflowError):
        pass
    return None, True
