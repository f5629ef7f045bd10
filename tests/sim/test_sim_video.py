"""Videos of camera images."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from cache_pipeline.errors import MissingExtraError
from cache_pipeline.sim.video import read_frames, side_by_side, write_video


def test_cameras_of_different_sizes_stand_side_by_side_in_even_sizes() -> None:
    obs = {"a": np.full((85, 84, 3), 10, np.uint8), "b": np.full((41, 51, 3), 200, np.uint8)}
    row = side_by_side(obs, ("a", "b"))
    assert row.shape == (256, 406, 3)
    assert row[0, 0, 0] == 10
    assert row[0, -2, 0] == 200
    assert row[-2, -2, 0] == 0


def test_large_images_are_not_enlarged() -> None:
    assert side_by_side({"a": np.zeros((480, 640, 3), np.uint8)}, ("a",)).shape == (480, 640, 3)


def test_a_written_video_has_every_frame(tmp_path: Path) -> None:
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    frames = [np.full((64, 96, 3), 20 * index, np.uint8) for index in range(7)]
    path = write_video(tmp_path / "films" / "episode", frames, fps=20)
    assert path == tmp_path / "films" / "episode.mp4"
    count, seconds = imageio_ffmpeg.count_frames_and_secs(path)
    assert count == 7
    assert seconds == pytest.approx(0.35, abs=0.06)


def test_without_ffmpeg_a_gif_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("imageio")
    hide(monkeypatch, "imageio_ffmpeg")
    path = write_video(tmp_path / "episode", [np.zeros((8, 8, 3), np.uint8)] * 3, fps=20)
    assert path.suffix == ".gif"
    assert path.stat().st_size > 0


def test_without_imageio_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "imageio")
    with pytest.raises(MissingExtraError, match=r"uv sync --extra sim"):
        write_video(tmp_path / "episode", [np.zeros((8, 8, 3), np.uint8)], fps=20)


def hide(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else find(name, *rest))


@pytest.mark.parametrize("ffmpeg", [True, False])
def test_frames_of_a_video_are_read_evenly_spaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ffmpeg: bool
) -> None:
    pytest.importorskip("imageio_ffmpeg" if ffmpeg else "imageio")
    if not ffmpeg:
        hide(monkeypatch, "imageio_ffmpeg")
    path = write_video(tmp_path / "a 'film', 1", [np.full((64, 96, 3), 20 * i, np.uint8) for i in range(11)], fps=20)
    frames = read_frames(path, 3)
    assert [frame.shape for frame in frames] == [(64, 96, 3)] * 3
    assert [int(frame.mean()) for frame in frames] == pytest.approx([0, 100, 200], abs=4)
    assert len(read_frames(path, 99)) == 11
