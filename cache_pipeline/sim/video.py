"""Writes what the cameras saw in an episode as a video."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.errors import MissingExtraError

MIN_HEIGHT_PX = 240
"""Smaller images are enlarged by a whole factor, so that a player shows more than a stamp."""


def side_by_side(obs: Mapping[str, NDArray], cameras: tuple[str, ...]) -> NDArray[np.uint8]:
    """The cameras' images (H, W, 3) in one row, enlarged and padded in black to even sizes, which mp4 needs."""
    images = [obs[camera] for camera in cameras]
    height = max(image.shape[0] for image in images)
    padded = [np.pad(image, ((0, height - image.shape[0]), (0, 0), (0, 0))) for image in images]
    row = np.concatenate(padded, axis=1)
    factor = -(-MIN_HEIGHT_PX // height) if height < MIN_HEIGHT_PX else 1
    row = row.repeat(factor, axis=0).repeat(factor, axis=1)
    return np.pad(row, ((0, row.shape[0] % 2), (0, row.shape[1] % 2), (0, 0)))


def write_video(path: Path, frames: Sequence[NDArray[np.uint8]], fps: int) -> Path:
    """Writes ``path`` with the ending .mp4, or .gif where there is no ffmpeg, and returns what was written.

    Raises MissingExtraError without imageio.
    """
    if importlib.util.find_spec("imageio") is None:
        raise MissingExtraError("videos need imageio, which is not installed: pip install 'cache-pipeline[sim]'")
    import imageio.v2 as imageio

    images: list[Any] = list(frames)
    path.parent.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("imageio_ffmpeg") is not None:
        path = path.with_suffix(".mp4")
        imageio.mimwrite(path, images, fps=fps, macro_block_size=2, output_params=["-loglevel", "error"])
    else:
        path = path.with_suffix(".gif")
        imageio.mimwrite(path, images, duration=1000 / fps, loop=0)
    return path
