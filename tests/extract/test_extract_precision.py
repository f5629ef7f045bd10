"""The choice of precision by its error, and caches whose precision a device lacks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_fakes import CAMERA, OTHER, extract
from fakes import make_dataset
from torch import nn
from typer.testing import CliRunner

from cache_pipeline.cache.manifest_store import read_manifest, write_manifest
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.cache.summary import inspect_cache
from cache_pipeline.cli import app
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.encoders import precision as precision_module
from cache_pipeline.encoders.image_encoder import EncoderSpec
from cache_pipeline.errors import ConfigError, EncoderError, StaleCacheError
from cache_pipeline.extract.camera_encoders import SAMPLE, _sample
from cache_pipeline.extract.verify import verify

HERE = Path(__file__).resolve()


class Offset(nn.Module):
    """(B,3,h,w) → (B,3): the mean colour, on top of a constant: bfloat16 and float16 round by the constant's size."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.full((3,), offset))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) + self.offset


def small_offset() -> nn.Module:
    return Offset(0.0)


def large_offset() -> nn.Module:
    return Offset(32.0)


def huge_offset() -> nn.Module:
    return Offset(256.0)


SMALL, LARGE, HUGE = (EncoderSpec(factory=f"{HERE}:{name}_offset") for name in ("small", "large", "huge"))


@pytest.fixture(autouse=True)
def bf16_in_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_module, "cpu_has_bf16", lambda: True)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "data.hdf5", lengths=(30, 20, 25))


def computed(cache: Path, camera: str = CAMERA) -> str:
    return FeatureCache(cache).cameras[camera].identity["precision"]["compute"]


def error(cache: Path, camera: str = CAMERA) -> float:
    measured = FeatureCache(cache).cameras[camera].measured
    assert measured is not None
    return float(measured["error_over_variation"])


def test_the_frames_that_a_precision_is_judged_on_come_from_all_of_every_demo(tmp_path: Path) -> None:
    """First frames alone vary by less than a policy sees."""
    lengths = (10,) * 70
    dataset = Dataset.open([make_dataset(tmp_path / "many.hdf5", lengths=lengths)])
    frames = _sample(dataset, CAMERA)
    firsts = {dataset.frames(demo, CAMERA, 0, 1).tobytes() for demo in range(len(lengths))}
    assert len(frames) == SAMPLE
    assert sum(frame.tobytes() in firsts for frame in frames) < SAMPLE / 4
    assert np.array_equal(frames, _sample(dataset, CAMERA))
    short = Dataset.open([make_dataset(tmp_path / "short.hdf5", lengths=(3, 2), masks={})])
    everything = np.concatenate([short.frames(demo, CAMERA, 0, 3 - demo) for demo in range(2)])
    assert np.array_equal(_sample(short, CAMERA), everything)


@pytest.mark.parametrize(("spec", "taken"), [(SMALL, "bf16"), (LARGE, "fp32")])
def test_auto_is_judged_by_the_variation_over_frames(
    dataset: Path, tmp_path: Path, spec: EncoderSpec, taken: str
) -> None:
    cache = tmp_path / "auto.zarr"
    extract(cache, dataset, encoders=spec, precision="auto", store_dtype="float32")
    assert computed(cache) == taken
    assert error(cache) <= 0.05
    forced = tmp_path / "bf16.zarr"
    extract(forced, dataset, encoders=spec, precision="bf16", store_dtype="float32")
    exact = tmp_path / "fp32.zarr"
    extract(exact, dataset, encoders=spec, precision="fp32", store_dtype="float32")
    features, wanted = (FeatureCache(path).features(CAMERA) for path in (forced, exact))
    found = np.linalg.norm(features - wanted) / np.linalg.norm(wanted - wanted.mean(0))
    assert error(forced) == pytest.approx(found, rel=0.3)
    assert (error(forced) <= 0.05) is (taken == "bf16")
    assert np.linalg.norm(features - wanted) / np.linalg.norm(wanted) < 5e-3, "the size of features would allow both"


def test_each_camera_is_judged_by_itself_whatever_comes_before_it(dataset: Path, tmp_path: Path) -> None:
    for number, (first, second) in enumerate(((SMALL, LARGE), (LARGE, SMALL))):
        cache = tmp_path / f"{number}.zarr"
        extract(cache, dataset, encoders={CAMERA: first, OTHER: second}, precision="auto", store_dtype="float32")
        taken = {SMALL: "bf16", LARGE: "fp32"}
        assert (computed(cache), computed(cache, OTHER)) == (taken[first], taken[second])


def test_storage_counts_and_the_bound_can_be_chosen(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extract(tmp_path / "wide.zarr", dataset, encoders=LARGE, precision="auto", precision_bound=1.0)
    assert computed(tmp_path / "wide.zarr") == "bf16"
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    extract(tmp_path / "half.zarr", dataset, encoders=HUGE, precision="fp32")
    assert error(tmp_path / "half.zarr") > 0.05
    assert "the error of fp32, stored as float16, is" in caplog.text
    assert "--store-dtype float32 is more exact" in caplog.text
    extract(tmp_path / "whole.zarr", dataset, encoders=HUGE, precision="fp32", store_dtype="float32")
    assert error(tmp_path / "whole.zarr") == 0
    with pytest.raises(ConfigError, match=r"precision_bound is 0\.0; it must be a finite number above 0"):
        extract(tmp_path / "none.zarr", dataset, precision_bound=0.0)


def test_a_named_precision_is_used_and_its_error_is_logged(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "bf16.zarr"
    extract(cache, dataset, encoders=LARGE, precision="bf16")
    assert computed(cache) == "bf16"
    assert f"{CAMERA}: the error of bf16, stored as float16, is {error(cache):.2g} of" in caplog.text
    assert "and 0.05 is allowed; --precision fp32 is more exact" in caplog.text
    summary = inspect_cache(cache)
    assert any(f"error {error(cache):.1e} of the features' variation over frames" in line for line in summary.lines())
    assert summary.to_json()["cameras"][CAMERA]["measured"]["error_over_variation"] == error(cache)


def change_manifest(cache: Path, measured: dict | None) -> None:
    """As an earlier version would have left it."""
    manifest = read_manifest(cache)
    cameras = {name: entry._replace(measured=measured) for name, entry in manifest.cameras.items()}
    write_manifest(cache, replace(manifest, cameras=cameras))


@pytest.mark.parametrize("measured", [None, {"precision_error": 0.004, "spread": 0.06}])
def test_a_cache_without_the_figure_is_read_verified_and_extended_in_its_precision(
    dataset: Path, tmp_path: Path, measured: dict | None
) -> None:
    cache = tmp_path / "old.zarr"
    extract(cache, dataset, encoders=LARGE, precision="bf16", cameras=(CAMERA,))
    change_manifest(cache, measured)
    assert not any("variation" in line for line in inspect_cache(cache).lines())
    result = verify(cache, device="cpu", encoder=LARGE.factory)
    assert result.ok
    assert result.error_over_variation is None
    more = make_dataset(tmp_path / "more.hdf5", lengths=(30, 20, 25, 8), masks={})
    extract(cache, more, encoders=LARGE, precision="auto", cameras=(CAMERA,))
    assert computed(cache) == "bf16"


@pytest.fixture
def from_elsewhere(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in fp16, made on a device that has it; this one does not."""
    cache = tmp_path / "fp16.zarr"
    lacking = precision_module.resolve_precision
    with monkeypatch.context() as patch:
        for name in ("frozen", "precision"):
            patch.setattr(f"cache_pipeline.encoders.{name}.resolve_precision", lambda precision, device: precision)
        patch.setattr("cache_pipeline.extract.camera_encoders.resolve_precision", lambda precision, device: precision)
        extract(cache, dataset, encoders=SMALL, precision="fp16")
    assert precision_module.resolve_precision is lacking
    assert computed(cache) == "fp16"
    return cache


def test_a_precision_that_the_device_lacks_is_read_and_verified_in_the_nearest(
    from_elsewhere: Path, dataset: Path
) -> None:
    assert np.isfinite(FeatureCache(from_elsewhere).features(CAMERA)).all()
    result = verify(from_elsewhere, device="cpu", encoder=SMALL.factory)
    assert result.ok
    assert result.tolerance == pytest.approx(2 * 5e-3 + 1e-3)
    assert 0 < result.max_rel < result.tolerance
    assert any("cpu lacks fp16, so frames were encoded in fp32 (tolerance 1e-02)" in line for line in result.lines())
    command = ["verify", str(from_elsewhere), "--device", "cpu", "--encoder", str(SMALL.factory), "--json"]
    asked = CliRunner().invoke(app, ["--quiet", *command])
    assert asked.exit_code == 0, asked.output
    assert json.loads(asked.stdout).keys() >= {"rows", "max_abs", "max_rel", "min_cosine", "tolerance", "ok"}


def test_such_a_cache_is_up_to_date_but_no_features_are_added_in_another_precision(
    from_elsewhere: Path, dataset: Path, tmp_path: Path
) -> None:
    before = FeatureCache(from_elsewhere).fingerprint
    assert extract(from_elsewhere, dataset, encoders=SMALL, precision="auto").units_encoded == 0
    more = make_dataset(tmp_path / "more.hdf5", lengths=(30, 20, 25, 8), masks={})
    with pytest.raises(EncoderError, match="computed in fp16, which cpu lacks, so the cache cannot be extended here"):
        extract(from_elsewhere, more, encoders=SMALL, precision="auto")
    with pytest.raises(StaleCacheError, match=r"precision\.compute"):
        extract(from_elsewhere, dataset, encoders=SMALL, precision="fp32")
    assert FeatureCache(from_elsewhere).fingerprint == before
    extract(from_elsewhere, dataset, encoders=SMALL, precision="auto", overwrite=True)
    assert computed(from_elsewhere) == "bf16"


def test_a_wrong_frame_is_found_where_frames_differ_by_less_than_a_precision_rounds_values(
    dataset: Path, tmp_path: Path
) -> None:
    """Mean colours on top of 32: as shares of their size, all frames agree within bf16's tolerance."""
    cache = tmp_path / "bf16.zarr"
    extract(cache, dataset, encoders=LARGE, precision="bf16", cameras=(CAMERA,), store_dtype="float32", shard_rows=128)
    assert verify(cache, rows=75, encoder=LARGE.factory).ok
    swapped = tmp_path / "swapped.hdf5"
    make_dataset(swapped, lengths=(30, 20, 25))
    import h5py

    with h5py.File(swapped, "r+") as file:
        images = file["data/demo_0/obs/agentview_image"]
        images[:] = images[:][::-1]
    manifest = read_manifest(cache)
    other = tmp_path / "other.zarr"
    extract(other, swapped, encoders=LARGE, precision="bf16", cameras=(CAMERA,), store_dtype="float32", shard_rows=128)
    write_manifest(other, manifest)
    result = verify(other, rows=75, encoder=LARGE.factory)
    assert result.max_rel < result.tolerance
    assert not result.ok
