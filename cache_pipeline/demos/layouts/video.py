"""Decodes videos in order, each frame once, with PyAV (FFmpeg)."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.errors import MissingExtraError, install_command
from cache_pipeline.isolation import progress

TOLERANCE_S = 1e-4
"""Largest distance of a frame from the time that is asked for, as in lerobot."""
FAR_S = 3.0
"""A time this far ahead is sought; nearer ones are reached by decoding."""
MOST_THREADS = 8


class Stream(NamedTuple):
    """Codec and size of a video, and its number of frames as the file states it (0: unknown)."""

    codec: str
    height: int
    width: int
    frames: int


def pyav() -> Any:
    """Imports PyAV; raises MissingExtraError if it is not installed."""
    try:
        import av
    except ImportError as error:
        raise MissingExtraError(
            f"videos of LeRobot datasets need PyAV ({error}): {install_command('lerobot')}"
        ) from error
    return av


def decoder() -> str:
    """Returns the name and version of the decoder, which brings its own FFmpeg; empty without it."""
    try:
        return f"PyAV {importlib.metadata.version('av')}"
    except importlib.metadata.PackageNotFoundError:
        return ""


def read_stream(path: Path) -> Stream:
    """Reads what a video file states about its first video stream; decodes nothing."""
    with pyav().open(str(path)) as container:
        stream = _video_stream(container)
        return Stream(stream.codec_context.name, stream.height, stream.width, stream.frames)


class Video:
    """An open video. Frames are read by time; times that rise are decoded in order, without a seek.

    Raises:
        OSError, ValueError, EOFError, IndexError: damaged files, and times without a frame.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._container = pyav().open(str(path))
        try:
            self._stream = _video_stream(self._container)
            self._stream.thread_type = "AUTO"
            self._stream.codec_context.thread_count = min(MOST_THREADS, os.cpu_count() or 1)
            self._converter = pyav().video.reformatter.VideoReformatter()
            self._frames = self._container.decode(self._stream)
            self._current: Any = None
        except BaseException:
            self._container.close()
            raise

    def read(self, times: NDArray[np.float64], out: NDArray[np.uint8]) -> None:
        """Decodes the frames at ``times`` (n,), in seconds, into ``out`` (n, H, W, 3) as rgb."""
        for time, image in zip(times.tolist(), out, strict=True):
            self._go_to(time)
            frame = self._current
            if (frame.height, frame.width) != image.shape[:2]:
                raise ValueError(f"a frame is {frame.height}×{frame.width}, not {image.shape[0]}×{image.shape[1]}")
            image[:] = self._converter.reformat(frame, format="rgb24").to_ndarray()

    def close(self) -> None:
        self._container.close()

    def _go_to(self, time: float) -> None:
        """Makes the frame at ``time`` the current one; raises ValueError if there is none."""
        now = self._current.time if self._current is not None else 0.0
        if time < now - TOLERANCE_S or time > now + FAR_S:
            self._seek(time)
        while self._current is None or self._current.time < time - TOLERANCE_S:
            progress()
            self._advance(time)
        if self._current.time > time + TOLERANCE_S:
            raise ValueError(f"it has no frame at {time:.4f} s; the next one is at {self._current.time:.4f} s")

    def _advance(self, time: float) -> None:
        frame = next(self._frames, None)
        if frame is None:
            last = f"{self._current.time:.4f} s" if self._current is not None else "none"
            raise ValueError(f"it has no frame at {time:.4f} s; its last frame: {last}")
        if frame.time is None:
            raise ValueError("a frame has no time")
        self._current = frame

    def _seek(self, time: float) -> None:
        """Goes to a key frame at or before ``time``; to the start if the file has no such entry."""
        for target in (max(0, int(time / self._stream.time_base)), 0):
            self._container.seek(target, stream=self._stream, backward=True)
            self._frames, self._current = self._container.decode(self._stream), None
            self._advance(time)
            if self._current.time <= time + TOLERANCE_S:
                return


def _video_stream(container: Any) -> Any:
    if not container.streams.video:
        raise ValueError("it holds no video")
    return container.streams.video[0]
