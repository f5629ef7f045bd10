"""The layouts of datasets, found by the content of a file or folder."""

from __future__ import annotations

from pathlib import Path

from cache_pipeline.demos.layouts import lerobot, robomimic
from cache_pipeline.demos.layouts.protocol import Layout
from cache_pipeline.errors import DatasetError
from cache_pipeline.text import listed

LAYOUTS: tuple[Layout, ...] = (robomimic, lerobot)


def layout_named(name: str) -> Layout:
    """Returns the layout of a recorded name."""
    for layout in LAYOUTS:
        if name == layout.NAME:
            return layout
    raise DatasetError(f"there is no dataset layout {name!r}; update cache_pipeline")


def is_dataset(path: Path) -> bool:
    """Whether a file or folder has one of the layouts."""
    return any(layout.detect(path) for layout in LAYOUTS)


def layout_of(path: Path) -> Layout:
    """Returns the layout of a dataset; a file that has none is left to the HDF5 layout, which says why.

    Raises:
        DatasetError: there is nothing at the path, or a folder that is no dataset.
    """
    if not path.exists():
        near = sorted(other.name for other in path.parent.glob("*.hdf5")) if path.parent.is_dir() else []
        beside = f"; the folder holds {listed(near)}" if near else "; check the path"
        raise DatasetError(f"there is no file {path}{beside}")
    for layout in LAYOUTS:
        if layout.detect(path):
            return layout
    if path.is_dir():
        inside = sorted(other.name for other in path.glob("*.hdf5"))
        holds = f", such as {listed(inside)} in it" if inside else ""
        raise DatasetError(f"{path} is a folder without meta/info.json; name a LeRobot folder, or an HDF5 file{holds}")
    return robomimic
