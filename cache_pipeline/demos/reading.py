"""Reads frames and rows of any layout. ``read_…`` run in the child process of :mod:`cache_pipeline.isolation`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.demos.layouts.protocol import SourceFile
from cache_pipeline.demos.layouts.registry import layout_named
from cache_pipeline.demos.numbers import as_float32
from cache_pipeline.errors import DatasetError
from cache_pipeline.hdf5 import damage_as_error
from cache_pipeline.isolation import isolated


def read_frames(
    source: SourceFile, camera: str, size: tuple[int, ...], segments: Sequence[tuple[str, int, int]]
) -> NDArray[np.uint8]:
    """Reads frames as ``Layout.frames``."""
    return layout_named(source.layout).frames(source, camera, size, segments)


def read_rows(
    source: SourceFile, demo: str, length: int, low_dim: Mapping[str, tuple[int, ...]], action_keys: Sequence[str]
) -> dict[str, NDArray]:
    """Reads all arrays of a demo except images, as float32; see ``Dataset.rows``."""
    layout = layout_named(source.layout)

    def read(path: str) -> NDArray[np.float32]:
        values = layout.numbers(source, demo, path)
        if values is None:
            raise DatasetError(f"{source.path}: {demo} has no {path}; run the same command again")
        return as_float32(values)

    parts = [read(key) for key in action_keys]
    flat = [part.reshape(len(part), -1) for part in parts]
    rows = {"actions": parts[0] if len(parts) == 1 and parts[0].ndim == 2 else np.concatenate(flat, axis=1)}
    for key in ("rewards", "dones"):
        values = layout.numbers(source, demo, key)
        rows[key] = np.full(length, np.nan, np.float32) if values is None else as_float32(values)
    for key, shape in low_dim.items():
        rows[f"low_dim/{key}"] = read(f"obs/{key}").reshape(length, *shape)
    return rows


def layout_findings(source: SourceFile, demos: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the problems and notes of ``Layout.findings``, in the child process."""
    with damage_as_error(source.path, "its rows"):
        return isolated(_findings, source, demos)


def _findings(source: SourceFile, demos: Sequence[str]) -> tuple[list[str], list[str]]:
    layout = layout_named(source.layout)
    try:
        return layout.findings(source, demos)
    finally:
        layout.close([source])


def close_files(sources: Sequence[SourceFile]) -> None:
    """Closes datasets; they open again on the next read."""
    for source in sources:
        layout_named(source.layout).close([source])
