"""Small LeRobot datasets, written with pyarrow and PyAV: the demos of ``fakes.make_dataset`` in its folders."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import demo_actions, demo_images, demo_states
from PIL import Image

TOP, WRIST = "observation.images.top", "observation.images.wrist"
SIZE = (32, 40, 3)
FPS = 10
CODECS = {"h264": "libx264", "av1": "libsvtav1"}
ROWS = {"action": 7, "observation.state": 5, "observation.environment_state": 4}


def episode(index: int, length: int, seed: int = 0) -> dict[str, Any]:
    """The arrays of one episode: column → (T, …); images before they are encoded."""
    point, goal = demo_states(f"episode_{index}", length, seed)
    rng = np.random.default_rng([seed, index])
    return {
        "action": demo_actions(point, goal, 7).astype(np.float32),
        "observation.state": np.concatenate([point, rng.normal(size=(length, 2))], axis=1).astype(np.float32),
        "observation.environment_state": rng.normal(size=(length, 4)).astype(np.float32),
        "next.reward": (np.arange(length) == length - 1).astype(np.float32),
        "next.done": np.arange(length) == length - 1,
        TOP: demo_images(point, goal, SIZE, 0),
        WRIST: demo_images(point, goal, SIZE, 1),
    }


def make_lerobot(
    folder: Path,
    *,
    version: str = "v3.0",
    images: str = "h264",
    lengths: Sequence[int] = (7, 5, 9),
    tasks: Sequence[str] = ("lift the cube", "open the drawer"),
    episodes_per_file: int = 2,
    times: Mapping[int, Sequence[float]] | None = None,
    splits: Mapping[str, str] | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Writes a dataset and returns the written arrays of each episode.

    Args:
        version: ``v2.0``, ``v2.1`` (one file per episode) or ``v3.0`` (``episodes_per_file`` in each file).
        images: a codec of videos, or ``PNG`` or ``JPEG`` for images in the parquet files.
        times: episode → timestamps in place of those of the frame rate.
    """
    pytest.importorskip("pyarrow", reason="needs the extra lerobot")
    pytest.importorskip("av", reason="needs the extra lerobot")
    episodes = [episode(index, length, seed) for index, length in enumerate(lengths)]
    for index, arrays in enumerate(episodes):
        stamps = (times or {}).get(index, np.arange(lengths[index]) / FPS)
        arrays["timestamp"] = np.asarray(stamps, np.float32)
    per_file = episodes_per_file if version == "v3.0" else 1
    groups = [list(range(at, min(at + per_file, len(lengths)))) for at in range(0, len(lengths), per_file)]
    for number, group in enumerate(groups):
        name = f"file-{number:03d}" if version == "v3.0" else f"episode_{number:06d}"
        _write_rows(folder / f"data/chunk-000/{name}.parquet", episodes, group, images, len(tasks))
        for camera in (TOP, WRIST) if images in CODECS else ():
            middle = f"{camera}/chunk-000" if version == "v3.0" else f"chunk-000/{camera}"
            frames = np.concatenate([episodes[index][camera] for index in group])
            write_video(folder / f"videos/{middle}/{name}.mp4", frames, images)
    _write_meta(folder, version, images, lengths, tasks, groups, splits)
    return episodes


def write_video(path: Path, frames: np.ndarray, codec: str = "h264") -> None:
    """Writes frames (n, H, W, 3) as a video of ``FPS`` frames per second, as lerobot does: a key frame every 2."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"g": "2", "crf": "30", **({"svtav1-params": "lp=1", "preset": "12"} if codec == "av1" else {})}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[codec], FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.time_base = Fraction(1, FPS)
        for image in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def read_video(path: Path) -> np.ndarray:
    """All frames of a video, (n, H, W, 3), decoded once from its start."""
    import av

    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def encode(image: np.ndarray, kind: str) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, kind)
    return data.getvalue()


def decoded(image: np.ndarray, kind: str) -> np.ndarray:
    """An image after it was encoded and decoded."""
    return np.asarray(Image.open(io.BytesIO(encode(image, kind))).convert("RGB"))


def _write_rows(
    path: Path, episodes: Sequence[Mapping[str, Any]], group: Sequence[int], images: str, tasks: int
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    tables = []
    for index in group:
        arrays, length = episodes[index], len(episodes[index]["action"])
        columns: dict[str, Any] = {
            name: pa.FixedSizeListArray.from_arrays(pa.array(arrays[name].ravel()), width)
            for name, width in ROWS.items()
        }
        columns |= {name: pa.array(arrays[name]) for name in ("next.reward", "next.done", "timestamp")}
        columns["frame_index"] = pa.array(np.arange(length))
        columns["episode_index"] = pa.array(np.full(length, index))
        columns["index"] = pa.array(sum(len(episodes[i]["action"]) for i in range(index)) + np.arange(length))
        columns["task_index"] = pa.array(np.full(length, index % tasks))
        for camera in (TOP, WRIST) if images not in CODECS else ():
            data = [{"bytes": encode(image, images), "path": f"{i}.png"} for i, image in enumerate(arrays[camera])]
            columns[camera] = pa.array(data, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        tables.append(pa.table(columns))
    pq.write_table(pa.concat_tables(tables), path, row_group_size=4)


def _write_meta(
    folder: Path,
    version: str,
    images: str,
    lengths: Sequence[int],
    tasks: Sequence[str],
    groups: Sequence[Sequence[int]],
    splits: Mapping[str, str] | None,
) -> None:
    kind = "video" if images in CODECS else "image"
    camera = {"dtype": kind, "shape": list(SIZE), "names": ["height", "width", "channels"]}
    features: dict[str, Any] = {TOP: camera, WRIST: camera}
    features |= {name: {"dtype": "float32", "shape": [width], "names": None} for name, width in ROWS.items()}
    features["next.reward"] = {"dtype": "float32", "shape": [1], "names": None}
    features["next.done"] = {"dtype": "bool", "shape": [1], "names": None}
    features |= {name: {"dtype": "int64", "shape": [1], "names": None} for name in ("frame_index", "episode_index")}
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    shared = version == "v3.0"
    data = "file-{file_index:03d}" if shared else "episode_{episode_index:06d}"
    chunk = "chunk-{chunk_index:03d}" if shared else "chunk-{episode_chunk:03d}"
    info = {
        "codebase_version": version,
        "robot_type": "panda",
        "total_episodes": len(lengths),
        "fps": FPS,
        "chunks_size": 1000,
        "splits": {"train": f"0:{len(lengths)}"} if splits is None else dict(splits),
        "data_path": f"data/{chunk}/{data}.parquet",
        "video_path": f"videos/{{video_key}}/{chunk}/{data}.mp4"
        if shared
        else f"videos/{chunk}/{{video_key}}/{data}.mp4",
        "features": features,
    }
    (folder / "meta").mkdir(parents=True, exist_ok=True)
    (folder / "meta/info.json").write_text(json.dumps(info))
    named = [[tasks[index % len(tasks)]] for index in range(len(lengths))]
    if shared:
        _write_episodes(folder, lengths, named, groups, [TOP, WRIST] if kind == "video" else [])
        return
    lines = [{"episode_index": i, "tasks": named[i], "length": length} for i, length in enumerate(lengths)]
    (folder / "meta/episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [{"task_index": i, "task": task} for i, task in enumerate(tasks)]
    (folder / "meta/tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_episodes(
    folder: Path, lengths: Sequence[int], tasks: Any, groups: Sequence[Sequence[int]], videos: Sequence[str]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for number, group in enumerate(groups):
        before = 0
        for index in group:
            row = {"episode_index": index, "tasks": tasks[index], "length": lengths[index]}
            row |= {"data/chunk_index": 0, "data/file_index": number}
            for camera in videos:
                row |= {f"videos/{camera}/chunk_index": 0, f"videos/{camera}/file_index": number}
                row[f"videos/{camera}/from_timestamp"] = before / FPS
                row[f"videos/{camera}/to_timestamp"] = (before + lengths[index]) / FPS
            rows.append(row)
            before += lengths[index]
    path = folder / "meta/episodes/chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
