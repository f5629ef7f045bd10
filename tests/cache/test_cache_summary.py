import json
import shutil

import h5py
import pytest
from cache_fakes import CAMERA, OTHER, extract
from fakes import make_dataset

from cache_pipeline.cache.manifest_store import MANIFEST
from cache_pipeline.cache.summary import inspect_cache
from cache_pipeline.errors import NotACacheError


@pytest.fixture
def cache(tmp_path):
    dataset = make_dataset(tmp_path / "demos.hdf5", lengths=(7, 5))
    extract(tmp_path / "cache.zarr", dataset)
    return tmp_path / "cache.zarr"


def test_a_complete_cache_tells_what_it_holds(cache):
    summary = inspect_cache(cache)
    value = summary.to_json()
    assert (value["state"], value["demos"], value["rows"]) == ("complete", 2, 12)
    assert value["cameras"][CAMERA]["feature_shape"] == [6]
    assert any(CAMERA in line for line in summary.lines())
    json.dumps(value)


def test_an_unfinished_cache_tells_its_units(cache):
    (cache / MANIFEST).rename(cache / "pending.json")
    next((cache / "ledger/features").rglob("*.json")).unlink()
    summary = inspect_cache(cache)
    assert (summary.state, summary.units_done, summary.units) == ("incomplete", 6, 7)
    assert "6 of 7 units are done" in "\n".join(summary.lines())


def test_a_corrupt_cache_is_told_not_raised(cache):
    (cache / MANIFEST).write_text("{")
    summary = inspect_cache(cache)
    assert summary.state == "corrupt"
    assert "damaged" in summary.problem
    json.dumps(summary.to_json())


def test_a_lost_record_is_told(cache):
    (cache / "ledger/steps/0.json").unlink()
    assert inspect_cache(cache).state == "corrupt"


def test_cameras_that_are_black_or_frozen_through_a_demo_are_told_by_extraction_and_by_the_summary(tmp_path, caplog):
    dataset = make_dataset(tmp_path / "still.hdf5", lengths=(7, 5, 9))
    with h5py.File(dataset, "r+") as file:
        file[f"data/demo_0/obs/{CAMERA}"][:] = 0
        file[f"data/demo_2/obs/{OTHER}"][:] = file[f"data/demo_2/obs/{OTHER}"][4]
    extract(tmp_path / "cache.zarr", dataset)
    told = (
        f"camera {CAMERA} is black through 1 whole demo (demo_0)",
        f"camera {OTHER} is frozen on one frame through 1 whole demo (demo_2)",
    )
    summary = inspect_cache(tmp_path / "cache.zarr")
    assert (summary.notes, summary.problems) == (told, ())
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert all(any(sentence in message for message in warned) for sentence in told)


def test_digests_of_frames_that_cannot_be_read_are_left_to_the_integrity_check(cache):
    shutil.rmtree(cache / "frame_digests")
    assert inspect_cache(cache).notes == ()


def test_what_is_no_cache_raises(tmp_path):
    with pytest.raises(NotACacheError):
        inspect_cache(tmp_path)
