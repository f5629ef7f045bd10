"""Writes camera images of an episode as a video."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.errors import MissingExtraError, install_command
from cache_pipeline.files import FileKind, begins_with, output_file

MIN_HEIGHT_PX = 240
"""Smaller images are enlarged by an integer factor, for video players."""


def side_by_side(obs: Mapping[str, NDArray], cameras: tuple[str, ...]) -> NDArray[np.uint8]:
    """Joins the cameras' images (H, W, 3) in one row, enlarged and padded in black to the even sizes of mp4."""
    images = [obs[camera] for camera in cameras]
    height = max(image.shape[0] for image in images)
    padded = [np.pad(image, ((0, height - image.shape[0]), (0, 0), (0, 0))) for image in images]
    row = np.concatenate(padded, axis=1)
    factor = -(-MIN_HEIGHT_PX // height) if height < MIN_HEIGHT_PX else 1
    row = row.repeat(factor, axis=0).repeat(factor, axis=1)
    return np.pad(row, ((0, row.shape[0] % 2), (0, row.shape[1] % 2), (0, 0)))


MP4, GIF = FileKind("a video", begins_with(b"ftyp", skip=4)), FileKind("a GIF picture", begins_with(b"GIF8"))


def write_video(path: Path, frames: Sequence[NDArray[np.uint8]], fps: int, *, overwrite: bool = False) -> Path:
    """Writes ``path`` with the suffix .mp4, or .gif without ffmpeg, and returns the written path.

    Raises:
        MissingExtraError: imageio is not installed.
        ConfigError: the path is taken and may not be replaced.
    """
    if importlib.util.find_spec("imageio") is None:
        raise MissingExtraError(f"videos need imageio, which is not installed: {install_command('sim')}")
    import imageio.v2 as imageio

    images: list[Any] = list(frames)
    suffix, kind = video_format()
    path = path.with_suffix(suffix)
    with output_file(path, kind, overwrite=overwrite) as partial:
        named = partial.with_name(partial.name + suffix)  # the suffix determines the format
        try:
            if kind is MP4:
                imageio.mimwrite(named, images, fps=fps, macro_block_size=2, output_params=["-loglevel", "error"])
            else:
                imageio.mimwrite(named, images, duration=1000 / fps, loop=0)
            named.replace(partial)
        finally:
            named.unlink(missing_ok=True)
    return path


def video_format() -> tuple[str, FileKind]:
    """Returns suffix and kind of the videos that this machine can write."""
    return (".mp4", MP4) if importlib.util.find_spec("imageio_ffmpeg") is not None else (".gif", GIF)
