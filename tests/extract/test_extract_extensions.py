"""A killed extension leaves the complete cache unchanged, and the next run finishes or removes it."""

import os
import shutil
import stat
import subprocess
from dataclasses import replace

import h5py
import numpy as np
import pytest
from cache_fakes import CAMERA, TINY, equal, extract, outputs
from fakes import make_dataset

from cache_pipeline.cache.integrity import check_integrity
from cache_pipeline.cache.layout import Unit
from cache_pipeline.cache.ledger import LedgerRecord, read_record, write_record
from cache_pipeline.cache.manifest_store import PENDING, read_manifest, write_manifest, write_pending
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.cache.summary import inspect_cache
from cache_pipeline.errors import CacheError, DatasetError, StaleCacheError
from cache_pipeline.extract import pipeline, worker
from cache_pipeline.files import digest

NAMES = ["demo_0", "demo_1", "demo_2"]
ONE_KEY, TWO_KEYS = ("robot0_eef_pos",), ("robot0_eef_pos", "robot0_gripper_qpos")


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "demos.hdf5", lengths=(6, 5, 14), names=NAMES)


@pytest.fixture
def out(tmp_path, dataset):
    extract(tmp_path / "cache.zarr", dataset, low_dim_keys=ONE_KEY)
    return tmp_path / "cache.zarr"


def everything(path):
    """All that a cache gives its readers."""
    cache = FeatureCache(path)
    names = ["actions", "rewards", "dones", *(f"low_dim/{key}" for key in cache.low_dim)]
    return cache.demos, [cache.features(CAMERA).tobytes(), *(cache.array(name).tobytes() for name in names)]


def killed_after(monkeypatch, where, count):
    """Has the ``count``-th call of one of the pipeline's steps end the run instead."""
    module = worker if hasattr(worker, where) else pipeline
    real, calls = getattr(module, where), []

    def step(*args, **kwargs):
        calls.append(args)
        if len(calls) > count:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, where, step)


EXTENSIONS = {
    "a key more, a demo less": ((6, 14), [NAMES[0], NAMES[2]], {"low_dim_keys": TWO_KEYS}),
    "another key": ((6, 5, 14), NAMES, {"low_dim_keys": TWO_KEYS[1:]}),
    "no key": ((6, 5, 14), NAMES, {"low_dim_keys": ()}),
    "views and demos more": ((6, 5, 14, 9), [*NAMES, "demo_7"], {"low_dim_keys": ONE_KEY, "views": 3}),
}


@pytest.mark.parametrize(
    "moment", [("write_record", 0), ("write_record", 1), ("save_weights", 0), ("complete_cache", 0)]
)
@pytest.mark.parametrize("what", EXTENSIONS)
def test_a_killed_extension_leaves_the_complete_cache_as_it_was(tmp_path, dataset, out, monkeypatch, what, moment):
    before, shards = everything(out), {file: file.stat() for file in out.rglob("c/*") if file.is_file()}
    lengths, names, options = EXTENSIONS[what]
    make_dataset(dataset, lengths=lengths, names=names)
    with monkeypatch.context() as patch:
        killed_after(patch, *moment)
        if what == "no key" and moment[0] == "write_record":
            extract(out, dataset, **options)  # has no unit to write
        else:
            with pytest.raises(KeyboardInterrupt):
                extract(out, dataset, **options)
            assert everything(out) == before
            assert check_integrity(out).ok
            assert inspect_cache(out).state == "complete"
    result = extract(out, dataset, **options)
    extract(tmp_path / "at_once.zarr", dataset, **options)
    assert result.fingerprint == outputs(tmp_path / "at_once.zarr")["fingerprint"]
    assert everything(out)[1] == everything(tmp_path / "at_once.zarr")[1]
    assert check_integrity(out).ok
    assert all(file.stat() == status for file, status in shards.items())


def test_a_key_that_left_and_comes_back_is_complete(dataset, out):
    extract(out, dataset, low_dim_keys=())
    make_dataset(dataset, lengths=(6, 5, 14, 9), names=[*NAMES, "demo_7"])
    extract(out, dataset, low_dim_keys=())
    extract(out, dataset, low_dim_keys=ONE_KEY)
    with h5py.File(dataset) as file:
        wanted = np.concatenate([file[f"data/{name}/obs/robot0_eef_pos"][()] for name in [*NAMES, "demo_7"]])
    assert equal(FeatureCache(out).array("low_dim/robot0_eef_pos"), wanted.astype(np.float32))
    assert check_integrity(out).ok


def test_arrays_of_a_complete_cache_never_change_their_shape(dataset, out):
    before = everything(out)
    make_dataset(dataset, lengths=(6, 5, 14), names=NAMES, action_dim=5)
    with pytest.raises(StaleCacheError, match=r"actions shape is \[7\] in the cache and \[5\] now.*--overwrite"):
        extract(out, dataset, low_dim_keys=ONE_KEY)
    make_dataset(dataset, lengths=(6, 5, 14), names=NAMES, low_dim={"robot0_eef_pos": 2})
    with pytest.raises(StaleCacheError, match=r"low_dim.robot0_eef_pos shape is \[3\] in the cache and \[2\] now"):
        extract(out, dataset, low_dim_keys=ONE_KEY)
    assert everything(out) == before
    extract(out, dataset, low_dim_keys=ONE_KEY, overwrite=True)
    assert FeatureCache(out).array("low_dim/robot0_eef_pos").shape == (25, 2)


def test_a_kill_between_the_manifest_and_the_removal_of_the_pending_one_leaves_nothing_unfinished(
    dataset, out, monkeypatch
):
    def stop(store, name):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cache_pipeline.cache.store.FolderStore.delete", stop)
        with pytest.raises(KeyboardInterrupt):
            extract(out, dataset, low_dim_keys=ONE_KEY, views=2)
    assert FeatureCache(out).cameras[CAMERA].views == 2
    assert (out / PENDING).exists()
    assert inspect_cache(out).problem == ""
    assert check_integrity(out).ok
    assert extract(out, dataset, low_dim_keys=ONE_KEY, views=2).units_encoded == 0
    assert not (out / PENDING).exists()


def test_a_pending_manifest_of_an_earlier_version_is_removed(dataset, out):
    write_pending(out, read_manifest(out))
    assert extract(out, dataset, low_dim_keys=ONE_KEY).units_encoded == 0
    assert not (out / PENDING).exists()
    assert inspect_cache(out).problem == ""


def as_made_by_an_earlier_version(path):
    """Makes the low-dim keys and the steps of each block one unit."""
    manifest = read_manifest(path)
    units = {name: output for name, output in manifest.units.items() if not name.startswith(("steps/", "low_dim/"))}
    cache = FeatureCache(path)
    for block in manifest.block_segments():
        unit = Unit("rows", "", 0, block)
        steps = read_record(path, Unit("steps", "", 0, block))
        names = sorted(["actions", "rewards", "dones", *(f"low_dim/{key}" for key in manifest.low_dim)])
        output = digest(*(cache._stored(name).block(block).tobytes() for name in names))
        write_record(path, unit, LedgerRecord(unit.name, *steps[1:3], manifest.unit_inputs(unit), output, 0.0))
        units[unit.name] = output
        for old in (Unit("steps", "", 0, block), *(Unit("low_dim", key, 0, block) for key in manifest.low_dim)):
            (path / "ledger" / f"{old.name}.json").unlink()
    write_manifest(path, replace(manifest, units=units))


def test_a_cache_of_an_earlier_version_is_read_checked_and_extended(dataset, out):
    before, shards = everything(out), {file: file.stat() for file in out.rglob("c/*") if file.is_file()}
    as_made_by_an_earlier_version(out)
    assert everything(out) == before
    assert check_integrity(out).ok
    assert inspect_cache(out).state == "complete"
    open_before = FeatureCache(out)
    result = extract(out, dataset, low_dim_keys=TWO_KEYS)
    assert result.images == 0
    assert all(file.stat() == status for file, status in shards.items())
    assert equal(open_before.array("actions"), FeatureCache(out).array("actions"))
    assert check_integrity(out).ok
    assert extract(out, dataset, low_dim_keys=TWO_KEYS).units_encoded == 0


@pytest.mark.parametrize("name", ["..", "zarr.json"])
@pytest.mark.parametrize("kind", ["camera", "low-dim key"])
def test_an_obs_key_that_cannot_be_a_folder_is_refused_before_any_work(tmp_path, dataset, name, kind):
    with h5py.File(dataset, "r+") as file:
        for demo in file["data"].values():
            demo["obs"].create_dataset(name, data=demo["obs"][CAMERA if kind == "camera" else "object"][()])
    options = {"low_dim_keys": (name,)} if kind == "low-dim key" else {}
    with pytest.raises(DatasetError, match=r"the obs key .* cannot be a folder of a cache; choose others"):
        extract(tmp_path / "new.zarr", dataset, **options)
    assert not (tmp_path / "new.zarr").exists()
    assert {file.name for file in tmp_path.iterdir()} == {"demos.hdf5"}


def may_write_anywhere():
    """Whether permissions do not bind this process."""
    return os.access("/proc/1/environ", os.W_OK) or os.geteuid() == 0


class ReadOnly:
    """Folders that nobody may write for a while; where permissions do not bind, a lock that cannot be taken."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch

    def __enter__(self):
        self.modes = {path: path.stat().st_mode for path in [self.folder, *self.folder.rglob("*")]}
        for path, mode in self.modes.items():
            path.chmod(mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
        if may_write_anywhere():
            real = os.open

            def refusing(path, flags, *args, **kwargs):
                if flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(str(self.folder)):
                    raise PermissionError(13, "Permission denied", str(path))
                return real(path, flags, *args, **kwargs)

            self.monkeypatch.setattr(os, "open", refusing)
        return self

    def __exit__(self, *error):
        self.monkeypatch.undo()
        for path, mode in self.modes.items():
            path.chmod(mode)


def test_a_cache_that_is_up_to_date_needs_no_lock(tmp_path, dataset, out, monkeypatch):
    shared = tmp_path / "shared"
    shared.mkdir()
    out = out.rename(shared / "cache.zarr")
    before = outputs(out)
    with ReadOnly(shared, monkeypatch):
        result = extract(out, dataset, low_dim_keys=ONE_KEY)
        assert (result.units_encoded, result.fingerprint) == (0, before["fingerprint"])
        assert check_integrity(out).ok
        for options in ({"low_dim_keys": TWO_KEYS}, {"low_dim_keys": ONE_KEY, "overwrite": True}):
            with pytest.raises(CacheError, match=r"not up to date and cannot be written \(Permission denied"):
                extract(out, dataset, **options)
        with pytest.raises(PermissionError):
            extract(shared / "other.zarr", dataset)
    assert outputs(out) == before
    assert [file.name for file in shared.iterdir()] == ["cache.zarr"]


def test_the_command_line_tells_a_full_disk_in_one_line(tmp_path):
    from typer.testing import CliRunner

    from cache_pipeline.cli import app

    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        dataset = make_dataset(tmp_path / "long.hdf5", lengths=(60,))
        extract(tmp_path / "long.zarr", dataset, encoders=TINY, views=8)
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - (8 << 10)))
        for out in ("a.npz", "a.hdf5"):
            result = CliRunner().invoke(app, ["cache", "export", str(tmp_path / "long.zarr"), "--out", str(disk / out)])
            assert result.exit_code == 1
            assert result.stderr.startswith("error: no space left for"), result.stderr
            assert len(result.stderr.splitlines()) == 1
        assert [file.name for file in disk.iterdir()] == ["filler"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
