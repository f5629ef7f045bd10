"""Small robomimic files that a policy can learn from: every action is a smooth function of what the images show."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

CAMERAS = {"agentview_image": (24, 24, 3), "robot0_eye_in_hand_image": (24, 24, 3)}
LOW_DIM = {"robot0_eef_pos": 3, "robot0_gripper_qpos": 2, "object": 4}
ENV_ARGS: dict[str, Any] = {"env_name": "Lift", "type": 1, "env_version": "1.5.2", "env_kwargs": {"robots": "Panda"}}


def make_dataset(
    path: str | Path,
    *,
    lengths: Sequence[int] = (7, 5, 9),
    names: Sequence[str] | None = None,
    cameras: Mapping[str, tuple[int, int, int]] = CAMERAS,
    low_dim: Mapping[str, int] = LOW_DIM,
    action_dim: int = 7,
    seed: int = 0,
    compression: str | None = "gzip",
    chunk_frames: int = 4,
    masks: Mapping[str, Sequence[str]] | None = None,
    env_args: dict[str, Any] | None = ENV_ARGS,
    render_flags: dict[str, Any] | None = None,
    total: bool = True,
    next_obs: bool = False,
) -> Path:
    """Writes a robomimic HDF5 file and returns its path.

    Each demo moves a point towards a goal. Images show both as blobs, ``robot0_eef_pos`` is the point, ``object``
    begins with the goal. Demos depend on (seed, name) alone, so a file with one more demo holds the others unchanged.

    Args:
        lengths: steps of each demo.
        names: demo names, ``demo_0`` … by default; gaps are allowed.
        cameras: obs key → (H, W, 3). low_dim: obs key → width.
        compression: of the images, in chunks of ``chunk_frames``; ``None`` lays them contiguously.
        masks: filter key → demo names; by default the last demo is ``valid`` and the others are ``train``.
        env_args, render_flags: JSON attributes of ``data``; ``None`` leaves them out, ``total=False`` the step count.
        next_obs: also write ``next_obs``.
    """
    names = [f"demo_{i}" for i in range(len(lengths))] if names is None else list(names)
    assert len(names) == len(lengths)
    if masks is None:
        masks = {"train": names[:-1], "valid": names[-1:]} if len(names) > 1 else {}
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        for name, value in (("env_args", env_args), ("render_flags", render_flags)):
            if value is not None:
                data.attrs[name] = json.dumps(value)
        if total:
            data.attrs["total"] = sum(lengths)
        for name, length in zip(names, lengths, strict=True):
            point, goal = demo_states(name, length + 1, seed)
            demo = data.create_group(name)
            demo.attrs["num_samples"] = length
            demo["actions"] = demo_actions(point[:length], goal, action_dim)
            demo["rewards"] = (np.arange(length) == length - 1).astype(np.float64)
            demo["dones"] = (np.arange(length) == length - 1).astype(np.int64)
            demo["states"] = np.concatenate([point[:length], np.broadcast_to(goal, (length, 3))], axis=1)
            for group, rows in (("obs", slice(0, length)), ("next_obs", slice(1, length + 1)))[: 2 if next_obs else 1]:
                obs = demo.create_group(group)
                for key, width in low_dim.items():
                    obs[key] = demo_low_dim(key, point[rows], goal, width)
                for number, (camera, shape) in enumerate(cameras.items()):
                    images = demo_images(point[rows], goal, shape, number)
                    layout = {"chunks": (min(chunk_frames, length), *shape), "compression": compression}
                    obs.create_dataset(camera, data=images, **(layout if compression and length else {}))
        for key, members in masks.items():
            file[f"mask/{key}"] = np.array([name.encode() for name in members], dtype="S12")
    return Path(path)


def demo_states(name: str, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The point at each step, (length, 3), and the goal, (3,), all within [0, 1]."""
    rng = np.random.default_rng([seed, *name.encode()])
    start, goal = rng.uniform(0.1, 0.9, (2, 3))
    speed = rng.uniform(0.1, 0.3)
    return goal + (start - goal) * (1 - speed) ** np.arange(length)[:, None], goal


def demo_actions(point: np.ndarray, goal: np.ndarray, width: int) -> np.ndarray:
    """(T, width) within ±1: towards the goal, then waves of the point."""
    step = np.tanh(2 * (goal - point))
    waves = [0.8 * np.sin(3 * point[:, i % 3] + i) for i in range(3, width)]
    return np.column_stack([*step.T, *waves])[:, :width]


def demo_low_dim(key: str, point: np.ndarray, goal: np.ndarray, width: int) -> np.ndarray:
    """(T, width): goal, then point for ``object``; the point, then waves of it, for any other key."""
    waves = np.column_stack([np.cos(point[:, i % 3] * (1 + i)) for i in range(width)])
    known = np.concatenate([np.broadcast_to(goal, point.shape), point], axis=1) if key == "object" else point
    return np.concatenate([known, waves], axis=1)[:, :width]


def demo_images(point: np.ndarray, goal: np.ndarray, shape: tuple[int, int, int], number: int) -> np.ndarray:
    """(T, H, W, 3) uint8: the point as a red blob, the goal as a green one, the point's height as a blue slope.

    Odd cameras look from the side: their picture axes are the second and third coordinate.
    """
    height, width, _ = shape
    v, u = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    first, second, depth = (0, 1, 2) if number % 2 == 0 else (1, 2, 0)

    def blob(at: np.ndarray) -> np.ndarray:
        return np.exp(-((u - at[:, first, None, None]) ** 2 + (v - at[:, second, None, None]) ** 2) / 0.02)

    goals = np.broadcast_to(goal, point.shape)
    slope = 0.5 * (u + v) / 2 + 0.5 * point[:, depth, None, None]
    return (255 * np.stack([blob(point), blob(goals), slope], axis=-1)).astype(np.uint8)
