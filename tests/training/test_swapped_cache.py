"""A training whose cache is swapped under it ends with an error, and never learns from other rows."""

import pytest
from cache_fakes import TINY, extract
from fakes import make_dataset
from training_runs import config, losses

from cache_pipeline.cache.compact import compact
from cache_pipeline.errors import StaleCacheError
from cache_pipeline.training.config import SavingConfig
from cache_pipeline.training.train import train
from cache_pipeline.training.update.learner import PolicyLearner


def test_a_streamed_training_ends_when_its_cache_is_compacted(tmp_path, monkeypatch):
    names = [f"demo_{number}" for number in range(5)]
    dataset, cache = make_dataset(tmp_path / "d.hdf5", lengths=(20,) * 5, names=names), tmp_path / "c.zarr"
    extract(cache, dataset, store_dtype="float32")
    make_dataset(dataset, lengths=(20,) * 4, names=names[1:])
    extract(cache, dataset, store_dtype="float32")
    options = {
        "encoder_factory": TINY.factory,
        "steps": 24,
        "source": "streamed",
        "max_memory": 3 * 48 * 12 * 4,
        "order": "full",
    }
    options["saving"] = SavingConfig(log_every=1, eval_every=0, save_every=0)
    train(config(tmp_path / "whole", cache, **options), progress=False)
    real = PolicyLearner.step

    def step(self, batch, number):
        if number == 4:
            compact(cache)
        return real(self, batch, number)

    monkeypatch.setattr(PolicyLearner, "step", step)
    with pytest.raises(StaleCacheError, match=r"compacted or made anew while .* was open"):
        train(config(tmp_path / "swapped", cache, **options), progress=False)
    whole, swapped = losses(tmp_path / "whole"), losses(tmp_path / "swapped")
    assert 4 <= len(swapped) < len(whole)
    assert swapped == whole[: len(swapped)]
