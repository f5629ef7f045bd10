"""What is not ours is never touched: not beside a cache, not at --out, not inside a cache's folder."""

import os
import shutil

import pytest
from cache_fakes import OTHER_WEIGHTS, extract, outputs
from fakes import make_dataset

from cache_pipeline.cache.compact import compact
from cache_pipeline.cache.folder import MARKER, check_target, make_beside
from cache_pipeline.cache.integrity import check_integrity
from cache_pipeline.cache.lock import writer_lock
from cache_pipeline.cache.manifest_store import MANIFEST, PENDING, is_cache, read_manifest
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.cache.store import store_at
from cache_pipeline.errors import CacheLockedError, ConfigError, NotACacheError, StaleCacheError
from cache_pipeline.files import json_digest, read_json, write_json


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "demos.hdf5", lengths=(7, 5))


@pytest.fixture
def cache(tmp_path, dataset):
    extract(tmp_path / "lift.zarr", dataset)
    return tmp_path / "lift.zarr"


def snapshot(folder):
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.rglob("*") if file.is_file()}


def project(folder):
    """A web application of somebody else."""
    (folder / "src").mkdir(parents=True)
    (folder / MANIFEST).write_text('{"manifest_version": 3, "name": "my web app", "format": 1}')
    (folder / "src/app.js").write_text("years of work")
    return folder


@pytest.mark.parametrize("kind", ["backup", "project"])
def test_folders_beside_a_cache_are_left_alone_by_every_writer(tmp_path, dataset, cache, kind):
    names = ["lift.zarr.old", "lift.zarr.new", ".lift.zarr.0badcafe.old", ".lift.zarr.0badcafe.new"]
    for name in names:
        if kind == "backup":
            shutil.copytree(cache, tmp_path / name)
            (tmp_path / name / "NOTES.txt").write_text("my notes")
        else:
            project(tmp_path / name)
    before = {name: snapshot(tmp_path / name) for name in names}
    extract(cache, dataset)
    compact(cache)
    extract(cache, dataset, encoders=OTHER_WEIGHTS, overwrite=True)
    shutil.rmtree(cache)
    extract(cache, dataset)
    assert {name: snapshot(tmp_path / name) for name in names} == before
    assert {file.name for file in tmp_path.iterdir()} == {"demos.hdf5", "lift.zarr", *names}


def test_a_copy_of_a_folder_that_we_left_is_the_users(tmp_path, dataset, cache):
    left, copy = tmp_path / ".lift.zarr.11111111.old", tmp_path / ".lift.zarr.22222222.old"
    shutil.copytree(cache, left)
    make_beside(store_at(left), store_at(cache), "old")
    shutil.copytree(left, copy)
    extract(cache, dataset)
    assert not left.exists()
    assert is_cache(copy)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_a_manifest_of_somebody_else_is_refused(tmp_path, dataset, overwrite):
    out = project(tmp_path / "site")
    before = snapshot(out)
    with pytest.raises(NotACacheError, match="other contents"):
        extract(out, dataset, overwrite=overwrite)
    for read in (read_manifest, FeatureCache, compact, check_integrity):
        with pytest.raises(NotACacheError, match="extract-features did not write its manifest"):
            read(out)
    assert snapshot(out) == before


@pytest.mark.parametrize("name", [PENDING, "run.json", "zarr.json", "ledger/rows/0.json", ".lift.zarr.1.partial.txt"])
def test_any_other_folder_is_refused_whatever_its_files_are_called(tmp_path, dataset, name):
    out = tmp_path / "lift.zarr"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(NotACacheError, match="other contents"):
            extract(out, dataset, overwrite=overwrite)
    assert (out / name).read_text() == "{}"


def test_no_cache_is_made_inside_another(cache, dataset):
    with pytest.raises(NotACacheError, match="inside the cache"):
        extract(cache / "features" / "deeper.zarr", dataset)


@pytest.mark.parametrize("damaged", [(MANIFEST,), (MANIFEST, "zarr.json")])
def test_a_damaged_cache_is_still_known_as_ours(cache, dataset, damaged):
    before = outputs(cache)
    for name in damaged:
        (cache / name).write_bytes(b"\0" * 100)
    check_target(store_at(cache))
    assert extract(cache, dataset).images == 0
    assert outputs(cache) == before


def test_a_manifest_of_another_format_is_refused_and_left_alone(cache, dataset):
    value = {key: item for key, item in read_json(cache / MANIFEST).items() if key != "digest"} | {"format": 7}
    write_json(cache / MANIFEST, {**value, "digest": json_digest(value)})
    before = snapshot(cache)
    for action in (lambda: FeatureCache(cache), lambda: extract(cache, dataset), lambda: compact(cache)):
        with pytest.raises(NotACacheError, match="has format 7; this version reads format 1"):
            action()
    assert snapshot(cache) == before


def test_what_a_user_put_into_a_cache_survives_compaction_and_overwriting(cache, dataset):
    (cache / "NOTES.txt").write_text("my notes")
    (cache / "plots").mkdir()
    (cache / "plots/loss.png").write_text("a picture")
    compact(cache)
    extract(cache, dataset, encoders=OTHER_WEIGHTS, overwrite=True)
    assert (cache / "NOTES.txt").read_text() == "my notes"
    assert (cache / "plots/loss.png").read_text() == "a picture"
    assert not (cache / MARKER).exists()
    assert check_integrity(cache).ok


def test_an_unfinished_cache_that_is_begun_anew_keeps_what_a_user_put_there(cache, dataset):
    (cache / MANIFEST).rename(cache / PENDING)
    (cache / "NOTES.txt").write_text("my notes")
    (cache / "half.partial").write_text("the user's")
    with pytest.raises(StaleCacheError):
        extract(cache, dataset, encoders=OTHER_WEIGHTS)
    extract(cache, dataset, encoders=OTHER_WEIGHTS, overwrite=True)
    assert (cache / "NOTES.txt").read_text() == "my notes"
    assert (cache / "half.partial").read_text() == "the user's"


def test_a_link_and_its_target_are_one_cache_with_one_lock(tmp_path, cache, dataset):
    link = tmp_path / "link.zarr"
    link.symlink_to(cache)
    before = outputs(cache)
    for held, asked in ((cache, link), (link, cache)):
        with writer_lock(held), pytest.raises(CacheLockedError), writer_lock(asked):
            pass
    compact(link)
    assert outputs(cache) == before
    extract(link, dataset, encoders=OTHER_WEIGHTS, overwrite=True)
    assert link.is_symlink()
    assert os.readlink(link) == str(cache)
    assert FeatureCache(link).fingerprint == FeatureCache(cache).fingerprint != before["fingerprint"]
    assert {file.name for file in tmp_path.iterdir()} == {"demos.hdf5", "lift.zarr", "link.zarr"}


def test_a_cache_is_made_where_a_link_points_to(tmp_path, dataset):
    (tmp_path / "link.zarr").symlink_to(tmp_path / "disk" / "real.zarr")
    extract(tmp_path / "link.zarr", dataset)
    assert is_cache(tmp_path / "disk" / "real.zarr")
    assert (tmp_path / "link.zarr").is_symlink()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConfigError, match="cannot be resolved"):
        extract(tmp_path / "loop", dataset)


def test_the_folder_one_is_in_can_be_a_cache(tmp_path, dataset, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    extract(".", dataset)
    assert is_cache(tmp_path / "here")
    assert extract(".", dataset).units_encoded == 0
    compact(".")
    with pytest.raises(ConfigError, match="root"):
        extract("/", dataset)
