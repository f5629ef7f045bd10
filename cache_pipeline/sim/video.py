"""Writes camera images of an episode as a video."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, run
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.errors import DISK_LIMITS, CachePipelineError, MissingExtraError, install_command
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


MP4_SUFFIX = ".mp4"
MP4, GIF = FileKind("a video", begins_with(b"ftyp", skip=4)), FileKind("a GIF picture", begins_with(b"GIF8"))


def write_video(path: Path, frames: Sequence[NDArray[np.uint8]], fps: int, *, overwrite: bool = False) -> Path:
    """Writes ``path`` with the suffix .mp4, or .gif without ffmpeg, and returns the written path.

    Raises:
        MissingExtraError: imageio is not installed.
        ConfigError: the path is taken and may not be replaced.
    """
    if importlib.util.find_spec("imageio") is None:
        raise MissingExtraError(f"videos need imageio, which is not installed: {install_command('sim')}")
    suffix, kind = video_format()
    path = path.with_suffix(suffix)
    with output_file(path, kind, overwrite=overwrite) as partial:
        if kind is MP4:
            _write_mp4(partial, frames, fps)
        else:
            partial.write_bytes(_gif(frames, fps))
    return path


def _write_mp4(path: Path, frames: Sequence[NDArray[np.uint8]], fps: int) -> None:
    """Writes frames of an even height and width; raises OSError if the disk is full."""
    import imageio_ffmpeg

    height, width = frames[0].shape[:2]
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    target = ["-an", "-pix_fmt", "yuv420p", "-f", "mp4", f"file:{path}"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *source, *target]
    # Ctrl-C is for this process only. With SIGXFSZ ignored, as in Python, a file size limit is an error, not a signal.
    with Popen(command, stdin=PIPE, stdout=DEVNULL, stderr=PIPE, process_group=0, restore_signals=False) as ffmpeg:
        assert ffmpeg.stdin is not None
        with suppress(BrokenPipeError):
            for frame in frames:
                ffmpeg.stdin.write(frame.tobytes())
        said = ffmpeg.communicate()[1].decode(errors="replace")
    if ffmpeg.returncode:
        for code in DISK_LIMITS:
            if os.strerror(code) in said:
                raise OSError(code, os.strerror(code), str(path))
        last = (said.strip().splitlines() or [f"it ended with {ffmpeg.returncode}"])[-1]
        raise CachePipelineError(f"ffmpeg cannot write a video to {path.parent}: {last}; check its disk")


def _gif(frames: Sequence[NDArray[np.uint8]], fps: int) -> bytes:
    import imageio.v2 as imageio

    content = io.BytesIO()
    images: list[Any] = list(frames)
    imageio.mimwrite(content, images, format="gif", duration=1000 / fps, loop=0)
    return content.getvalue()


def read_frames(path: Path, count: int) -> list[NDArray[np.uint8]]:
    """Returns up to ``count`` frames (H, W, 3) of a video, evenly spaced from the first to the last.

    Raises:
        ImportError: imageio is not installed. OSError, ValueError, RuntimeError: it cannot be read.
    """
    if MP4.holds(path):
        return _mp4_frames(path.absolute(), count)
    if not GIF.holds(path):
        raise ValueError("it is not a video that rollout writes")
    import imageio.v2 as imageio

    frames = imageio.mimread(path)
    return [np.asarray(frames[number])[..., :3] for number in _spread(count, len(frames))]


def _spread(count: int, total: int) -> list[int]:
    return np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()


def _mp4_frames(path: Path, count: int) -> list[NDArray[np.uint8]]:
    import imageio_ffmpeg

    total, _ = imageio_ffmpeg.count_frames_and_secs(str(path))
    chosen = "+".join(f"eq(n,{number})" for number in _spread(count, total))
    options = ["-vf", f"select='{chosen}'", "-fps_mode", "passthrough", "-c:v", "ppm", "-f", "image2pipe", "-"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", f"file:{path}", *options]
    content = run(command, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL, check=False).stdout
    frames = []
    while content:  # P6, width and height, 255, pixels
        _, size, _, content = content.split(b"\n", 3)
        width, height = map(int, size.split())
        frames.append(np.frombuffer(content, np.uint8, height * width * 3).reshape(height, width, 3))
        content = content[height * width * 3 :]
    if not frames:
        raise ValueError("it has no frames")
    return frames


def video_format() -> tuple[str, FileKind]:
    """Returns suffix and kind of the videos that this machine can write."""
    return (MP4_SUFFIX, MP4) if importlib.util.find_spec("imageio_ffmpeg") is not None else (".gif", GIF)
