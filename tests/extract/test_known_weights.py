"""ImageNet weights are downloaded once: afterwards the cache holds them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from cache_fakes import config as asked
from cache_fakes import extract, outputs
from fakes import make_dataset

from cache_pipeline.encoders import resnet
from cache_pipeline.encoders.image_encoder import EncoderSpec
from cache_pipeline.errors import EncoderError, StaleCacheError
from cache_pipeline.extract.plan import plan_extraction

IMAGENET = EncoderSpec(rgb_model_name="resnet18", weights="imagenet")
SMALL = {"encoders": IMAGENET, "cameras": ("agentview_image",)}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "lift.hdf5", lengths=(5, 4))


@pytest.fixture
def cache(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of weights that cannot be downloaded any more."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        state = resnet.get_resnet("resnet18").state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(resnet, "imagenet_state", lambda name: state)
        extract(tmp_path / "c.zarr", dataset, **SMALL)
    monkeypatch.setattr(resnet, "imagenet_state", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "c.zarr"


def no_network(name: str) -> None:
    raise EncoderError("no network")


def test_a_finished_cache_is_rerun_planned_and_extended_without_a_download(cache: Path, dataset: Path) -> None:
    before = outputs(cache)
    assert extract(cache, dataset, **SMALL).units_encoded == 0
    assert outputs(cache) == before
    assert plan_extraction(asked(cache, dataset, **SMALL)).images == 0
    dataset.unlink()
    make_dataset(dataset, lengths=(5, 4, 3))
    assert extract(cache, dataset, **SMALL).images == 3


def test_damaged_weights_in_a_cache_are_not_used(cache: Path, dataset: Path) -> None:
    (file,) = (cache / "encoder").iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(EncoderError, match="no network"):
        extract(cache, dataset, **SMALL)


def test_torchvisions_own_file_decides_before_the_weights_in_a_cache(
    cache: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints/resnet18-f37072fd.pth").touch()
    monkeypatch.setattr(resnet, "imagenet_state", lambda name: resnet.get_resnet(name).state_dict())
    with pytest.raises(StaleCacheError, match=r"encoder\.weights"):
        extract(cache, dataset, **SMALL)


def test_a_dry_run_of_a_new_cache_downloads_nothing(
    cache: Path, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "cache_pipeline"):
        plan = plan_extraction(asked(tmp_path / "new.zarr", dataset, **SMALL))
    assert plan.images == 9
    assert "a dry run does not download" in caplog.text
    with pytest.raises(EncoderError, match="no network"):
        extract(tmp_path / "new.zarr", dataset, **SMALL)
