"""Writes demos in robomimic's HDF5 layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from cache_pipeline.files import FileKind
from cache_pipeline.hdf5 import group_attributes, holds_hdf5
from cache_pipeline.sim.collect_config import FileConfig

DEMO = "demo"
"""The group of a part that holds one demo, or its images."""


def _is_dataset(path: Path) -> bool:
    return holds_hdf5(path) and group_attributes(path) is not None


DATASET = FileKind("a dataset", _is_dataset)


class RecordedDemo(NamedTuple):
    """T steps. Obs and states at t precede ``actions[t]``; rewards, dones and next obs at t follow it."""

    obs: dict[str, NDArray]
    actions: NDArray[np.float64]
    rewards: NDArray[np.float64]
    dones: NDArray[np.int64]
    states: NDArray[np.float64]
    model_xml: str
    success: bool
    next_obs: dict[str, NDArray] | None = None


def write_demo(group: h5py.Group, demo: RecordedDemo, config: FileConfig) -> None:
    """Writes one demo into ``data/<demo>``."""
    for name, obs in (("obs", demo.obs), ("next_obs", demo.next_obs or {})):
        write_images(group, {key: values for key, values in obs.items() if key in config.cameras}, config, name)
        for key in (key for key in obs if key not in config.cameras):
            group.create_dataset(f"{name}/{key}", data=obs[key])
    for name in ("actions", "rewards", "dones", "states"):
        group.create_dataset(name, data=getattr(demo, name))
    group.attrs["num_samples"] = len(demo.actions)
    group.attrs["model_file"] = demo.model_xml


def write_images(
    group: h5py.Group, images: Mapping[str, NDArray[np.uint8]], config: FileConfig, name: str = "obs"
) -> None:
    """Writes camera → (T, H, W, 3) into the obs or next obs of a demo, compressed in chunks of some frames."""
    for camera, values in images.items():
        chunk = (min(config.frames_per_chunk, len(values)), *values.shape[1:])
        group.create_dataset(
            f"{name}/{camera}", data=values, chunks=chunk, compression="gzip", compression_opts=config.gzip_level
        )


def write_mask(file: h5py.File, key: str, demos: Iterable[str]) -> None:
    """Writes a filter key."""
    file.create_dataset(f"mask/{key}", data=np.array(list(demos), dtype="S"))
