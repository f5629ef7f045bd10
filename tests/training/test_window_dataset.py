"""Windows for a training loop of the user's own: the samples of our training, in workers too."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_fakes import OTHER_WEIGHTS, extract
from torch.utils.data import DataLoader

from cache_pipeline import FeatureCache, WindowDataset
from cache_pipeline.demos.windows import WindowSpec
from cache_pipeline.errors import CacheError, ConfigError, StaleCacheError
from cache_pipeline.training.data.resident import ResidentSource
from cache_pipeline.training.data.rows import cache_row_numbers
from cache_pipeline.training.data.run_data import DemoChoice, open_cache_data
from cache_pipeline.training.data.sampler import Plan
from cache_pipeline.training.data.source import CachedRows

CPU = torch.device("cpu")


def same(ours: Any, theirs: Any) -> None:
    """The same (obs, actions, mask) with the same dtypes."""
    (obs, actions, mask), (other_obs, other_actions, other_mask) = ours, theirs
    assert list(obs) == list(other_obs)
    pairs = [*((obs[key], other_obs[key]) for key in obs), (actions, other_actions), (mask, other_mask)]
    for one, other in pairs:
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
        assert torch.as_tensor(one).dtype == torch.as_tensor(other).dtype


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("valid", [False, True])
def test_samples_are_those_of_training_in_its_order(cache: Path, valid: bool, view: int) -> None:
    data = open_cache_data(cache, None, None, DemoChoice())
    splits = data.splits(WindowSpec(3, 5), CPU)
    assert data.cache is not None
    numbers = cache_row_numbers(data.cache, data.split)
    train, held_out = splits
    source = ResidentSource(CachedRows(data.cache, tuple(data.cameras), numbers, 2), (train, held_out), CPU)
    split = splits[valid]
    assert split is not None
    everything = Plan(0, np.arange(len(split)), np.full(len(split), view), 0)
    (batch,) = source.batches([everything], valid=valid)
    dataset = WindowDataset(cache, obs_horizon=3, action_horizon=5, filter_key="valid" if valid else "train", view=view)
    assert len(dataset) == len(split)
    same(dataset.batch(range(len(dataset))), batch)
    chosen = data.split.valid if valid else data.split.train
    same(WindowDataset(cache, obs_horizon=3, action_horizon=5, demos=chosen, view=view).batch([4, 0]), [
        {key: values[[4, 0]] for key, values in batch.obs.items()}, batch.actions[[4, 0]], batch.mask[[4, 0]]
    ])  # fmt: skip


@pytest.mark.parametrize(("workers", "start"), [(0, None), (2, "fork"), (1, "spawn")])
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_data_loader_gives_the_batches_whatever_its_workers(cache: Path, workers: int, start: str | None) -> None:
    dataset = WindowDataset(cache)
    _ = dataset[0]  # arrays are open when workers begin
    loader = DataLoader(dataset, batch_size=16, num_workers=workers, multiprocessing_context=start)
    numbers = np.array_split(np.arange(len(dataset)), range(16, len(dataset), 16))
    batches = list(loader)
    assert len(batches) == len(numbers) == 3
    for batch, chosen in zip(batches, numbers, strict=True):
        assert isinstance(batch[1], torch.Tensor)
        same(batch, dataset.batch(chosen))


def test_one_sample_has_the_shapes_that_its_docstring_tells(cache: Path) -> None:
    dataset = WindowDataset(FeatureCache(cache), cameras=["agentview_image"], low_dim_keys=["robot0_eef_pos"])
    obs, actions, mask = dataset[-1]
    assert {key: (values.shape, values.dtype.name) for key, values in obs.items()} == {
        "agentview_image": ((2, 512), "float32"),
        "robot0_eef_pos": ((2, 3), "float32"),
    }
    assert (actions.shape, actions.dtype.name, mask.tolist()) == ((8, 7), "float32", [True, *[False] * 7])
    assert len(list(dataset)) == len(dataset) == 42
    assert len(pickle.loads(pickle.dumps(dataset))) == 42


def test_a_mini_batch_is_read_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, calls = WindowDataset(cache), []
    real = FeatureCache.features
    monkeypatch.setattr(FeatureCache, "features", lambda *args: calls.append(args) or real(*args))
    batch = next(iter(DataLoader(dataset, batch_size=8)))
    assert len(batch[1]) == 8
    assert len(calls) == len(dataset.cameras)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cameras": ["agentview"]}, ConfigError, "no camera 'agentview'.*did you mean agentview_image"),
        ({"low_dim_keys": ["objekt"]}, ConfigError, "no low-dim key 'objekt'.*robot0_eef_pos"),
        ({"filter_key": "tran"}, ConfigError, "filter key 'tran'; available: train, valid .did you mean train"),
        ({"demos": [0, 4]}, ConfigError, "no demo number 4; its demos are numbered 0 to 3"),
        ({"demos": []}, ConfigError, "demos is empty"),
        ({"demos": [0], "filter_key": "train"}, ConfigError, "give one of them"),
        ({"view": 2}, CacheError, "has views 0 to 1.*--views 3"),
        ({"obs_horizon": 0}, ConfigError, "obs_horizon is 0"),
    ],
)
def test_what_the_cache_does_not_have_is_named(cache: Path, options: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        WindowDataset(cache, **options)


def test_a_cache_that_is_made_anew_meanwhile_is_noticed(dataset: Path, tmp_path: Path) -> None:
    extract(tmp_path / "c.zarr", dataset)
    windows = WindowDataset(tmp_path / "c.zarr")
    extract(tmp_path / "c.zarr", dataset, encoders=OTHER_WEIGHTS, overwrite=True)
    with pytest.raises(StaleCacheError, match=r"made anew while .* was open"):
        windows[0]
