"""Compares this package with the cache that people write by hand, on the same policy and the same loss.

By hand means: torchvision's network in eager fp32 over all frames, features kept in a ``.npy`` file (read through a
``DataLoader`` with two workers) or in a ``.pt`` file (held in memory, no workers), and a plain loop with
``torch.optim.AdamW``. Policy, normalisation and batch are ours in all three, in fp32.

``uv run docs/benchmarks/by_hand.py --dataset lift.hdf5`` prints the table of docs/benchmarks.md. Each is measured in a
process of its own, in turns.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import torchvision
from common import MEGABYTE, Table, arguments, command, encoder_options, markdown, measured, spread
from torch.utils.data import DataLoader, Dataset

import cache_pipeline as cp
from cache_pipeline.policies.batch import Batch
from cache_pipeline.training.train import open_training

KINDS = ("ours", "npy", "pt")
NAMES = {
    "ours": "extract-features and train",
    "npy": ".npy, memory-mapped, DataLoader with 2 workers",
    "pt": ".pt in memory, DataLoader without workers",
}
HORIZON, CHUNK, BATCH, STEPS, WARM_UP, ROUNDS = 2, 8, 64, 400, 50, 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEAD = ["how", "build, s", "steps/s", "relative to ours", "peak memory, MB", "features on disk, MB"]


class Windows(Dataset):  # type: ignore[type-arg]
    """The windows of demos over arrays, with the first obs and the last action repeated at the ends."""

    def __init__(self, features: dict[str, Any], low_dim: dict[str, Any], actions: Any, lengths: list[int]) -> None:
        self.features, self.low_dim, self.actions = features, low_dim, actions
        starts = np.cumsum([0, *lengths[:-1]])
        self.places = [
            (start, start + n, start + t) for start, n in zip(starts, lengths, strict=True) for t in range(n)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        first, end, at = self.places[index]
        rows = np.maximum(np.arange(at - HORIZON + 1, at + 1), first)
        later = np.arange(at, at + CHUNK)
        obs = {key: as_tensor(values[rows]) for key, values in {**self.features, **self.low_dim}.items()}
        return obs, as_tensor(self.actions[np.minimum(later, end - 1)]), torch.from_numpy(later < end)


def as_tensor(values: Any) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values), dtype=torch.float32)


def build(dataset: Path, cameras: list[str], demos: list[str]) -> dict[str, np.ndarray]:
    """Runs torchvision's network over the frames of each camera, as its documentation shows."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None)
    network.fc = torch.nn.Identity()
    network.eval()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    found: dict[str, list[np.ndarray]] = {camera: [] for camera in cameras}
    with h5py.File(dataset) as file, torch.no_grad():
        for demo in demos:
            for camera in cameras:
                frames = torch.from_numpy(file[f"data/{demo}/obs/{camera}"][:]).permute(0, 3, 1, 2).float() / 255
                for part in torch.split((frames - mean) / std, 64):
                    found[camera].append(network(part).numpy())
    return {camera: np.concatenate(parts) for camera, parts in found.items()}


def measure(kind: str, dataset: Path, cache: Path, folder: Path) -> dict[str, Any]:
    """Builds the features, and trains on them for ``STEPS`` steps."""
    config = cp.TrainConfig(
        cache=cache, steps=10**6, batch_size=BATCH, obs_horizon=HORIZON, action_horizon=CHUNK, precision="fp32"
    )
    session = open_training(config, folder / "run")
    policy, data = session.policy, session.data
    demos = [name for _, name in data.rows.demos[: data.rows.n_train]]
    started = time.perf_counter()
    features: dict[str, Any] = build(dataset, list(data.cameras), demos)
    folder.mkdir(parents=True, exist_ok=True)
    for camera, values in features.items():
        file = folder / f"{camera}.{kind}"
        np.save(file.with_suffix(".npy"), values) if kind == "npy" else torch.save(torch.from_numpy(values), file)
    seconds = time.perf_counter() - started
    size = sum(file.stat().st_size for file in folder.glob(f"*.{kind}"))
    if kind == "npy":
        features = {camera: np.load(folder / f"{camera}.npy", mmap_mode="r") for camera in features}
    with h5py.File(dataset) as file:
        groups = [file[f"data/{demo}"] for demo in demos]
        low_dim = {key: np.concatenate([group[f"obs/{key}"][:] for group in groups]) for key in data.low_dim}
        actions = np.concatenate([group["actions"][:] for group in groups])
        lengths = [len(group["actions"]) for group in groups]
    windows = Windows(features, low_dim, actions, lengths)
    workers = 2 if kind == "npy" else 0
    loader = DataLoader(
        windows, BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )
    optimiser = torch.optim.AdamW((value for _, value in policy.policy_parameters()), lr=1e-3)
    policy.train()
    done, began = 0, 0.0
    while done < WARM_UP + STEPS:
        for obs, action, mask in loader:
            if done == WARM_UP:
                began = time.perf_counter()
            loss = policy.loss(Batch(obs, action, mask))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            done += 1
            if done == WARM_UP + STEPS:
                break
    rate = STEPS / (time.perf_counter() - began)
    return {"build_s": seconds, "steps_per_s": rate, "loss": loss.item(), "megabytes": size / MEGABYTE}


def by_hand(kind: str, dataset: Path, cache: Path, folder: Path) -> dict[str, Any]:
    """Calls ``measure`` in another process. Memory is that of the largest of its processes."""
    done = measured(Path(__file__), "--measure", kind, dataset, cache, folder)
    return {**done.result, "peak_mb": done.peak_mb}


def ours(dataset: Path, folder: Path) -> dict[str, Any]:
    cache, run = folder / "ours.zarr", folder / "ours"
    made = command("extract-features", dataset, "--out", cache, "--overwrite", *encoder_options("resnet18", "random"))
    words = ["--obs-horizon", HORIZON, "--action-horizon", CHUNK, "--batch-size", BATCH, "--precision", "fp32"]
    done = command("train", "--from-cache", cache, "--out", run, "--steps", STEPS, "--overwrite", *words)
    return {
        "build_s": made.result["seconds"],
        "steps_per_s": done.result["steps_per_s"],
        "loss": done.result["final_loss"],
        "megabytes": made.result["bytes"] / MEGABYTE,
        "peak_mb": max(made.peak_mb, done.peak_mb),
    }


def main() -> None:
    if "--measure" in sys.argv:
        kind, *paths = sys.argv[sys.argv.index("--measure") + 1 :]
        print(json.dumps(measure(kind, *map(Path, paths))))
        return
    options = arguments(__doc__, "by_hand").parse_args()
    table = Table(options.out, {"steps": STEPS, "rounds": ROUNDS, "dataset": options.dataset.name})
    cells: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    cache = options.work / "ours.zarr"
    for number in range(ROUNDS):
        for kind in KINDS:
            folder = options.work / kind
            cells[kind].append(
                table.cell(
                    f"{kind}, round {number}",
                    lambda kind=kind, folder=folder: (
                        ours(options.dataset, options.work)
                        if kind == "ours"
                        else by_hand(kind, options.dataset, cache, folder)
                    ),
                )
            )
    rows = []
    for kind, found in cells.items():
        columns = {name: [cell[name] for cell in found] for name in found[0]}
        ratio = sum(columns["steps_per_s"]) / sum(cell["steps_per_s"] for cell in cells["ours"])
        rates = [spread(columns["build_s"]), spread(columns["steps_per_s"]), f"{ratio:.2g}"]
        rows.append([NAMES[kind], *rates, spread(columns["peak_mb"], 4), f"{found[0]['megabytes']:.0f}"])
    print(markdown(HEAD, rows))


if __name__ == "__main__":
    main()
