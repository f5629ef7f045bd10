"""A cache keeps to the devices that it was made on, and its ledger says which."""

import json

import pytest
import torch
import torchvision
from cache_fakes import CAMERA, extract, outputs
from fakes import make_dataset

from cache_pipeline.cache.compact import compact
from cache_pipeline.cache.layout import Unit
from cache_pipeline.cache.ledger import MadeWith, read_record
from cache_pipeline.cache.manifest_store import read_manifest
from cache_pipeline.errors import OptionError, StaleCacheError
from cache_pipeline.extract import prepare, worker
from cache_pipeline.files import json_digest

CPU = MadeWith("cpu", torch.__version__, torchvision.__version__, "fp32")


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "demos.hdf5", lengths=(17, 9))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "cache.zarr"


@pytest.fixture
def other_device(monkeypatch):
    """Makes the CPU pass for another device."""
    for module in (prepare, worker):
        monkeypatch.setattr(module, "device_name", lambda device: "NVIDIA H100")


def test_the_ledger_says_what_made_each_unit(dataset, out):
    extract(out, dataset)
    assert read_record(out, Unit("features", CAMERA, 0, 0)).made_with == CPU
    assert read_record(out, Unit("frames", CAMERA, 0, 0)).made_with is None
    assert read_manifest(out).devices == ("cpu",)


def test_features_of_another_device_are_refused_before_any_work_unless_allowed(dataset, out, other_device):
    with pytest.MonkeyPatch.context() as patch:
        for module in (prepare, worker):
            patch.setattr(module, "device_name", lambda device: "cpu")
        extract(out, dataset)
    before = outputs(out)
    assert extract(out, dataset).units_encoded == 0
    with pytest.raises(StaleCacheError, match=r"device is 'cpu' in the cache and 'NVIDIA H100' now.*--allow-other"):
        extract(out, dataset, views=2)
    assert outputs(out) == before
    extract(out, dataset, views=2, allow_other_device=True)
    assert read_manifest(out).devices == ("NVIDIA H100", "cpu")
    assert read_record(out, Unit("features", CAMERA, 1, 0)).made_with.device == "NVIDIA H100"
    assert extract(out, dataset, views=2).units_encoded == 0


def test_an_unfinished_cache_keeps_to_its_device_too(dataset, out, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cache_pipeline.extract.pipeline.finish", stop)
        with pytest.raises(KeyboardInterrupt):
            extract(out, dataset)
    (out / "ledger/features" / CAMERA / "0/0.json").unlink()
    monkeypatch.setattr(prepare, "device_name", lambda device: "NVIDIA H100")
    with pytest.raises(StaleCacheError, match="device"):
        extract(out, dataset)


def test_unlike_devices_in_one_command_are_refused(dataset, out, monkeypatch):
    monkeypatch.setattr(prepare, "device_name", str)
    monkeypatch.setattr(prepare, "resolve_device", lambda name: torch.device("cpu") if name == "cpu" else "H100")
    with pytest.raises(OptionError, match=r"--devices are unlike \(H100, cpu\)"):
        extract(out, dataset, devices=("cpu", "cuda:0"))


def test_records_and_manifests_of_earlier_versions_stay_valid(dataset, out, other_device):
    extract(out, dataset)
    before = outputs(out)
    for file in [*out.glob("ledger/**/*.json"), out / "manifest.json"]:
        value = json.loads(file.read_text())
        value = {key: item for key, item in value.items() if key not in ("made_with", "devices", "digest")}
        file.write_text(json.dumps({**value, "digest": json_digest(value)}))
    assert read_record(out, Unit("features", CAMERA, 0, 0)).made_with is None
    result = extract(out, dataset, views=2)
    assert result.units_reused == len(before["units"])
    assert read_manifest(out).devices == ("NVIDIA H100",)


def test_compacting_keeps_what_made_a_unit(dataset, out):
    extract(out, dataset)
    make_dataset(dataset, lengths=(9,), names=["demo_1"])
    extract(out, dataset)
    compact(out)
    assert read_record(out, Unit("features", CAMERA, 0, 0)).made_with == CPU
    assert read_manifest(out).devices == ("cpu",)
