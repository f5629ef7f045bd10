"""Linked files and sources of virtual datasets are recorded; a missing one is an error, not zeros."""

import h5py
import numpy as np
import pytest
from fakes import make_dataset

from cache_pipeline import isolation
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.demos.summary import inspect_dataset
from cache_pipeline.errors import DatasetError

CAMERA = "agentview_image"
IMAGES = f"data/demo_1/obs/{CAMERA}"


def external(file, elsewhere):
    with h5py.File(elsewhere, "w") as other:
        other["images"] = file[IMAGES][()]
    del file[IMAGES]
    file[IMAGES] = h5py.ExternalLink(elsewhere.name, "images")


def external_demo(file, elsewhere):
    with h5py.File(elsewhere, "w") as other:
        file.copy("data/demo_1", other, "images")
    del file["data/demo_1"]
    file["data/demo_1"] = h5py.ExternalLink(elsewhere.name, "images")


def virtual(file, elsewhere):
    images = file[IMAGES][()]
    with h5py.File(elsewhere, "w") as other:
        other["images"] = images
    layout = h5py.VirtualLayout(images.shape, images.dtype)
    layout[:] = h5py.VirtualSource(elsewhere.name, "images", images.shape)
    del file[IMAGES]
    file.create_virtual_dataset(IMAGES, layout)


def soft_to_external(file, elsewhere):
    external(file, elsewhere)
    file.move(IMAGES, "kept")
    file[IMAGES] = h5py.SoftLink("/kept")


def raw(file, elsewhere):
    images = file[IMAGES][()]
    elsewhere.write_bytes(images.tobytes())
    del file[IMAGES]
    file.create_dataset(IMAGES, images.shape, images.dtype, external=[(str(elsewhere), 0, images.nbytes)])


LINKS = [external, external_demo, virtual, soft_to_external, raw]


@pytest.fixture(params=LINKS)
def linked(request, tmp_path):
    path = make_dataset(tmp_path / "main.hdf5")
    with h5py.File(path, "r+") as file:
        request.param(file, tmp_path / "other.hdf5")
    return path


def test_linked_frames_are_read_and_their_files_recorded(linked, tmp_path):
    plain = make_dataset(tmp_path / "plain.hdf5")
    dataset = Dataset.open(linked)
    np.testing.assert_array_equal(dataset.frames(1, CAMERA), Dataset.open(plain).frames(1, CAMERA))
    (stamp,) = dataset.files[0].linked
    other = tmp_path / "other.hdf5"
    assert stamp == (other, other.stat().st_size, other.stat().st_mtime_ns)
    assert Dataset.open(plain).files[0].linked == ()


def test_a_linked_file_that_is_missing_is_named_in_one_line(linked, tmp_path):
    (tmp_path / "other.hdf5").rename(tmp_path / "gone.hdf5")
    with pytest.raises(DatasetError, match=r"demo_1.*other\.hdf5.* missing") as caught:
        Dataset.open(linked)
    assert "damaged" not in str(caught.value)
    summary = inspect_dataset(linked)
    assert not summary.sound
    assert any("other.hdf5" in problem for problem in summary.files[0].problems)


def test_a_linked_file_that_changes_after_opening_is_reported(linked, tmp_path):
    dataset = Dataset.open(linked)
    with (tmp_path / "other.hdf5").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(DatasetError, match=r"other\.hdf5 has changed since it was opened"):
        dataset.frames(1, CAMERA)


def test_a_virtual_dataset_with_holes_is_refused(tmp_path):
    path = make_dataset(tmp_path / "main.hdf5")
    with h5py.File(path, "r+") as file:
        images = file[IMAGES][()]
        file["part"] = images[:3]
        layout = h5py.VirtualLayout(images.shape, images.dtype)
        layout[:3] = h5py.VirtualSource(".", "part", images[:3].shape)
        del file[IMAGES]
        file.create_virtual_dataset(IMAGES, layout)
    with pytest.raises(DatasetError, match=r"demo_1: obs/agentview_image is a virtual dataset whose sources hold"):
        Dataset.open(path)


def compressed(path, key, code):
    """Stores one array behind a filter that HDF5 does not have, as a file from another machine has it."""
    with h5py.File(path, "r+") as file:
        values = file[key][()]
        del file[key]
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk(values.shape)
        plist.set_filter(code, h5py.h5z.FLAG_OPTIONAL, ())
        space = h5py.h5s.create_simple(values.shape)
        item = h5py.h5d.create(file.id, key.encode(), h5py.h5t.py_create(values.dtype), space, plist)
        item.write_direct_chunk((0,) * values.ndim, values.tobytes(), 0)


@pytest.fixture
def new_child():
    isolation.end_child()
    yield
    isolation.end_child()


@pytest.fixture
def without_hdf5plugin(new_child, tmp_path, monkeypatch):
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "hdf5plugin.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path / "none")
    monkeypatch.delenv("HDF5_PLUGIN_PATH", raising=False)


@pytest.mark.usefixtures("without_hdf5plugin")
@pytest.mark.parametrize(("code", "name"), [(32001, "blosc"), (32015, "zstd"), (311, "number 311")])
@pytest.mark.parametrize("key", [IMAGES, "data/demo_1/actions", "data/demo_1/rewards"])
def test_a_filter_that_is_not_installed_is_named_with_the_package(tmp_path, key, code, name):
    path = make_dataset(tmp_path / "packed.hdf5")
    compressed(path, key, code)
    with pytest.raises(DatasetError, match=f"is compressed with {name}.*not installed here: pip install hdf5plugin"):
        Dataset.open(path)
    problems = inspect_dataset(path).files[0].problems
    assert len(problems) == 1
    assert "damaged" not in problems[0]


@pytest.mark.usefixtures("without_hdf5plugin")
def test_an_unused_camera_may_have_any_filter(tmp_path):
    path = make_dataset(tmp_path / "packed.hdf5")
    compressed(path, IMAGES, 32001)
    assert Dataset.open(path, cameras=["robot0_eye_in_hand_image"]).steps == 21


@pytest.mark.usefixtures("new_child")
def test_hdf5plugin_is_imported_only_if_a_filter_is_missing(tmp_path, monkeypatch):
    loaded = tmp_path / "loaded"
    (tmp_path / "hdf5plugin.py").write_text(f"open({str(loaded)!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    path = make_dataset(tmp_path / "packed.hdf5")
    with Dataset.open(path) as dataset:
        dataset.frames(1, CAMERA)
    assert not loaded.exists()
    compressed(path, IMAGES, 32001)
    inspect_dataset(path)
    assert loaded.exists()


@pytest.mark.usefixtures("new_child")
@pytest.mark.parametrize("compression", ["Blosc", "Blosc2", "Zstd", "LZ4", "Bitshuffle", "BZip2"])
def test_filters_of_hdf5plugin_are_read_when_it_is_installed(tmp_path, compression):
    hdf5plugin = pytest.importorskip("hdf5plugin", reason="needs the extra hdf5plugin")
    path = make_dataset(tmp_path / "packed.hdf5")
    with Dataset.open(path) as dataset:
        frames, rows = dataset.frames(1, CAMERA), dataset.rows(1)
    with h5py.File(path, "r+") as file:
        for key, chunks in ((IMAGES, (3, 24, 24, 3)), ("data/demo_1/actions", (2, 7))):
            values = file[key][()]
            del file[key]
            file.create_dataset(key, data=values, chunks=chunks, compression=getattr(hdf5plugin, compression)())
    isolation.end_child()  # the next one has not scanned the file, and the filter is not registered in it
    with Dataset.open(path) as dataset:
        isolation.end_child()
        np.testing.assert_array_equal(dataset.frames(1, CAMERA), frames)
        np.testing.assert_array_equal(dataset.rows(1)["actions"], rows["actions"])
    summary = inspect_dataset(path)
    assert summary.sound
    (camera,) = (line for line in summary.lines() if f"camera        {CAMERA}" in line)
    assert compression.lower() in camera.lower()
