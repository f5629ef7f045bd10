"""Budgets are peaks, and what is free is what this process may still take."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_fakes import extract
from fakes import make_dataset

from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.training.data import live, memory, resident
from cache_pipeline.training.data import sources as data
from cache_pipeline.training.data.live import DemoFrames
from cache_pipeline.training.data.memory import fits, host_budget, memory_budget, piece_rows
from cache_pipeline.training.data.source import CachedRows

CPU = torch.device("cpu")
GIB = 1 << 30


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in {"stat": "anon 5\ninactive_file 0\ntotal_inactive_file 0\n", **files}.items():
        (folder / f"memory.{name}").write_text(f"{value}\n")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 100 GiB free, and no limits yet."""
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(memory, "_free_of_machine", lambda: 100 * GIB)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return tmp_path


def test_without_limits_half_of_the_machines_free_memory_counts(groups: Path) -> None:
    assert memory_budget(CPU, None) == 50 * GIB
    assert memory_budget(CPU, 7) == 7


@pytest.mark.parametrize(("limited", "free"), [("", 6), ("pod", 6), ("pod/box", 6), ("other", 100)])
def test_the_tightest_limit_of_nested_control_groups_counts(limited: str, free: int, groups: Path) -> None:
    (groups / "own").write_text("0::/pod/box\n")
    for name in ("", "pod", "pod/box", "other"):
        group(groups / name, max="max", current=5 * GIB)
    group(groups / limited, max=10 * GIB, current=4 * GIB)
    assert memory_budget(CPU, None) == free * GIB // 2


@pytest.mark.parametrize("own", ["9:cpu,memory:/docker/abc\n0::/\n", "9:memory:/where/the/host/sees/it\n", None])
def test_limits_of_control_groups_of_version_1_count(own: str | None, groups: Path) -> None:
    if own is not None:
        (groups / "own").write_text(own)
    group(groups / "memory", limit_in_bytes=8 * GIB, usage_in_bytes=2 * GIB)
    assert memory_budget(CPU, None) == 3 * GIB
    group(groups / "memory", limit_in_bytes=(1 << 63) - 4096, usage_in_bytes=2 * GIB)
    assert memory_budget(CPU, None) == 50 * GIB
    if own is not None and "docker" in own:
        group(groups / "memory/docker/abc", limit_in_bytes=4 * GIB, usage_in_bytes=2 * GIB)
        assert memory_budget(CPU, None) == GIB


def test_pages_of_files_that_the_system_would_drop_count_as_free(groups: Path) -> None:
    group(groups, max=10 * GIB, current=9 * GIB, stat=f"anon 1\ninactive_file {5 * GIB}")
    assert memory_budget(CPU, None) == 3 * GIB


def test_processes_on_one_machine_share_what_is_free(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert host_budget() == 50 * GIB // 4
    group(groups, max=10 * GIB, current=12 * GIB)
    assert host_budget() == 0


def test_pools_are_bounded_by_the_hosts_memory_on_a_gpu_too(groups: Path) -> None:
    group(groups, max=3 * GIB, current=GIB)
    assert data._pool_budget(torch.device("cuda"), 16 * GIB) == GIB
    assert data._pool_budget(CPU, 16 * GIB) == 16 * GIB


def test_what_fits_leaves_room_for_the_piece_that_is_loaded() -> None:
    assert fits(32 << 20, 33 << 20)
    assert not fits(32 << 20, (33 << 20) - 1)
    assert piece_rows(1 << 20, 1024) == 32 << 10
    assert piece_rows(10, 1024) == 1024
    assert piece_rows(10, 1 << 40) == 1


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LEAST_PIECE", 1)


@pytest.mark.usefixtures("small_pieces")
def test_resident_features_are_loaded_through_pieces_and_equal_what_the_cache_gives(tmp_path: Path) -> None:
    path = tmp_path / "lift.zarr"
    extract(path, make_dataset(tmp_path / "d.hdf5", lengths=(60, 50, 70)), views=2, store_dtype="float32")
    cache, camera = FeatureCache(path), "agentview_image"
    numbers = np.concatenate([cache.live_rows[60:], cache.live_rows[:60]])
    expected = np.concatenate([cache.features(camera, numbers, view) for view in range(2)])
    largest: list[int] = []
    real = FeatureCache.features

    class Watched(FeatureCache):
        def features(self, *args, **options):
            values = real(self, *args, **options)
            largest.append(values.nbytes)
            return values

    rows = CachedRows(Watched(path), (camera,), numbers, views=2)
    loaded = resident._load(rows, camera, CPU)
    assert np.array_equal(loaded.numpy(), expected)
    assert max(largest) <= expected.nbytes // memory.PIECES


@pytest.mark.usefixtures("small_pieces")
def test_resident_frames_are_loaded_with_a_peak_of_their_own_size(tmp_path: Path) -> None:
    shape = (84, 84, 3)
    path = make_dataset(tmp_path / "d.hdf5", lengths=(30, 20, 50), cameras={"agentview_image": shape}, compression=None)
    frames = DemoFrames(Dataset.open(path), (2, 0, 1), np.array([0, 50, 80]))
    expected = np.concatenate([frames.dataset.frames(demo, "agentview_image") for demo in (2, 0, 1)])
    tracemalloc.start()
    loaded = live._ResidentFrames(frames, ("agentview_image",), CPU)._frames["agentview_image"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # torch's memory, in which the frames end up, is not traced: what is, comes on top of it.
    assert np.array_equal(loaded.numpy(), expected)
    assert peak < expected.nbytes // 4
