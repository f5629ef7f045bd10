import json

import pytest
from cache_fakes import extract, outputs
from fakes import make_dataset

from cache_pipeline.cache.integrity import check_integrity
from cache_pipeline.cache.manifest_store import MANIFEST
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.errors import CorruptCacheError, IncompleteCacheError, NotACacheError


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "demos.hdf5", lengths=(7, 12))


@pytest.fixture
def cache(tmp_path, dataset):
    path = tmp_path / "cache.zarr"
    extract(path, dataset, views=2)
    return path


def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_a_sound_cache_is_ok(cache):
    result = check_integrity(cache)
    assert result.ok
    assert result.units == len(outputs(cache)["units"])
    json.dumps(result.to_json())


def test_a_flipped_byte_in_any_file_is_found(cache):
    files = [file for file in cache.rglob("*") if file.is_file()]
    assert len(files) > 30
    for file in files:
        content = file.read_bytes()
        flip(file, len(content) // 2)
        assert not check_integrity(cache).ok, file
        file.write_bytes(content)
        for record in (cache / "ledger").rglob("*.json"):
            assert record.exists()


@pytest.fixture(autouse=True)
def ledger_stays(monkeypatch, request):
    if "any_file" in request.node.name:
        monkeypatch.setattr("cache_pipeline.cache.integrity.strike_record", lambda path, unit: None)


def test_the_damaged_unit_is_named_and_extraction_makes_just_that_anew(cache, dataset):
    before = outputs(cache)
    unit = "features/agentview_image/1/0"
    flip(cache / "features/agentview_image/c/1/0/0", 50)
    assert check_integrity(cache).broken == (unit,)
    with pytest.raises(CorruptCacheError, match=r"verify .* --integrity"):
        FeatureCache(cache).features("agentview_image", view=1)
    assert extract(cache, dataset, views=2).units_encoded == 1
    assert check_integrity(cache).ok
    assert outputs(cache) == before


def test_a_missing_shard_is_never_read_as_fill_values(cache):
    (cache / "actions/c/0/0").unlink()
    with pytest.raises(CorruptCacheError, match="actions/c/0/0 is missing"):
        FeatureCache(cache).array("actions")
    assert check_integrity(cache).broken == ("steps/0",)


@pytest.mark.parametrize("name", ["zarr.json", "features/agentview_image/zarr.json", "encoder"])
def test_damaged_metadata_and_weights_are_named_and_mended(cache, dataset, name):
    file = next((cache / name).iterdir()) if name == "encoder" else cache / name
    before = file.read_bytes()
    flip(file, len(before) // 2)
    assert check_integrity(cache).broken == (str(file.relative_to(cache)),)
    assert extract(cache, dataset, views=2).units_encoded == 0
    assert check_integrity(cache).ok


def test_a_damaged_manifest_is_made_anew_from_the_ledger(cache, dataset):
    before = outputs(cache)
    flip(cache / MANIFEST, 200)
    assert check_integrity(cache).broken == (MANIFEST,)
    with pytest.raises(CorruptCacheError):
        FeatureCache(cache)
    assert extract(cache, dataset, views=2).units_encoded == 0
    assert outputs(cache) == before


def test_what_is_no_complete_cache_is_told(cache, tmp_path):
    with pytest.raises(NotACacheError):
        check_integrity(tmp_path / "nothing")
    (cache / MANIFEST).rename(cache / "pending.json")
    with pytest.raises(IncompleteCacheError):
        check_integrity(cache)
