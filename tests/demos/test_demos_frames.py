"""Bulk reading gives the frames of h5py for every layout."""

from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_pipeline.demos.layouts import hdf5_frames as frames
from cache_pipeline.demos.layouts.hdf5_frames import _start_reading

LAYOUTS = {
    "contiguous": {},
    "plain chunks": {"chunks": (3, 10, 8, 3)},
    "gzip": {"chunks": (3, 10, 8, 3), "compression": "gzip"},
    "gzip of one frame": {"chunks": (1, 10, 8, 3), "compression": "gzip"},
    "gzip of tiles": {"chunks": (4, 7, 3, 2), "compression": "gzip"},
    "gzip as h5py chooses": {"chunks": True, "compression": "gzip"},
    "gzip and shuffle": {"chunks": (3, 10, 8, 3), "compression": "gzip", "shuffle": True},
    "gzip and checksum": {"chunks": (3, 10, 8, 3), "compression": "gzip", "fletcher32": True},
    "lzf": {"chunks": (3, 10, 8, 3), "compression": "lzf"},
}


def read_frames(stored, start, stop):
    out = np.full((stop - start, *stored.shape[1:]), 7, np.uint8)
    with ThreadPoolExecutor(3) as pool:
        for future in _start_reading(stored, start, out, pool):
            future.result()
    return out


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 255, (11, 10, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def file(tmp_path_factory, images):
    path = tmp_path_factory.mktemp("frames") / "layouts.hdf5"
    with h5py.File(path, "w") as file:
        for name, options in LAYOUTS.items():
            file.create_dataset(name, data=images, **options)
    with h5py.File(path) as file:
        yield file


@pytest.mark.parametrize("layout", LAYOUTS)
@given(rows=st.tuples(st.integers(0, 11), st.integers(0, 11)))
@settings(max_examples=25, deadline=None)
def test_any_rows_of_any_layout_equal_the_written_rows(file, images, layout, rows):
    start, stop = sorted(rows)
    np.testing.assert_array_equal(read_frames(file[layout], start, stop), images[start:stop])


@pytest.mark.parametrize(("layout", "inflated"), [("gzip", True), ("gzip and shuffle", True), ("lzf", False)])
def test_gzip_chunks_are_decompressed_by_isal_and_other_filters_by_h5py(file, monkeypatch, layout, inflated):
    calls = []
    decompress = frames.isal_zlib.decompress
    monkeypatch.setattr(frames.isal_zlib, "decompress", lambda *a, **k: calls.append(1) or decompress(*a, **k))
    read_frames(file[layout], 0, 11)
    assert len(calls) == (4 if inflated else 0)


def test_a_chunk_stored_without_its_filter_is_read_correctly(tmp_path, images):
    path = tmp_path / "masked.hdf5"
    with h5py.File(path, "w") as file:
        stored = file.create_dataset("images", data=images[:6], chunks=(3, 10, 8, 3), compression="gzip")
        stored.id.write_direct_chunk((3, 0, 0, 0), images[8:11].tobytes(), filter_mask=1)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(read_frames(file["images"], 0, 6), np.concatenate([images[:3], images[8:11]]))
