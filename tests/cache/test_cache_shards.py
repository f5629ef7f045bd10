import json

import numpy as np
import pytest
import zarr
from cache_fakes import CAMERA, equal, extract
from fakes import make_dataset

from cache_pipeline.cache import shards
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.cache.shards import ShardLayout, open_shard, uncompressed_layout, write_shard
from cache_pipeline.cache.store import FolderStore

LAYOUT = ShardLayout(chunks=6, chunk_bytes=40, fill=b"\x00\x7e")
ROW_BYTES = 10
ROWS = 24


@pytest.fixture
def values():
    """(24, 10) rows, of which 4 share a chunk."""
    return np.random.default_rng(0).integers(0, 256, (ROWS, ROW_BYTES), np.uint8)


def write(file, values):
    write_shard(FolderStore(file.parent), file.name, LAYOUT, values.reshape(LAYOUT.chunks, -1))


def read(file, start=0, count=ROWS):
    out = np.empty((count, ROW_BYTES), np.uint8)
    with open_shard(FolderStore(file.parent), file.name, LAYOUT) as shard:
        shard.read_span(start, out)
    return out


def read_rows(file, rows):
    out = np.empty((len(rows), ROW_BYTES), np.uint8)
    with open_shard(FolderStore(file.parent), file.name, LAYOUT) as shard:
        shard.read_rows(np.array(rows), out)
    return out


def test_every_span_of_rows_comes_back(tmp_path, values):
    write(tmp_path / "s", values)
    for start in range(ROWS):
        for count in range(1, ROWS - start + 1):
            assert equal(read(tmp_path / "s", start, count), values[start : start + count])


def test_scattered_rows_come_back(tmp_path, values):
    write(tmp_path / "s", values)
    for rows in ([0], [23], [0, 3, 4, 22], [1, 5, 6, 7, 16], list(range(ROWS))):
        assert equal(read_rows(tmp_path / "s", rows), values[rows])


def test_long_spans_are_read_by_several_calls(tmp_path, values, monkeypatch):
    write(tmp_path / "s", values)
    for size in (1, 90, 1000):
        monkeypatch.setattr(shards, "CALL_BYTES", size)
        assert equal(read(tmp_path / "s", 3, 19), values[3:22])


def test_chunks_of_fill_values_take_no_bytes(tmp_path, values):
    values[4:8].reshape(-1, 2)[...] = np.frombuffer(LAYOUT.fill, np.uint8)
    write(tmp_path / "s", values)
    assert (tmp_path / "s").stat().st_size == 5 * (40 + 4) + LAYOUT.index_bytes
    assert equal(read(tmp_path / "s"), values)
    assert equal(read(tmp_path / "s", 6, 3), values[6:9])
    assert equal(read_rows(tmp_path / "s", [1, 5, 9]), values[[1, 5, 9]])


def test_any_flipped_byte_and_any_cut_is_found(tmp_path, values):
    write(tmp_path / "s", values)
    content = (tmp_path / "s").read_bytes()
    for at in range(len(content)):
        (tmp_path / "s").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ValueError, match=r"shard|checksum"):
            read(tmp_path / "s")
        (tmp_path / "s").write_bytes(content[:at])
        with pytest.raises(ValueError, match=r"shard|checksum"):
            read(tmp_path / "s")


def test_zarr_reads_what_we_write_and_we_read_what_zarr_writes(tmp_path):
    dataset = make_dataset(tmp_path / "d.hdf5", lengths=(20, 9))
    extract(tmp_path / "c.zarr", dataset, views=2)
    cache = FeatureCache(tmp_path / "c.zarr")
    array = zarr.open_group(tmp_path / "c.zarr", mode="r+")[f"features/{CAMERA}"]
    for view in (0, 1):
        assert equal(array[view, :29], cache.features(CAMERA, view=view))
    turned = array[0][::-1]
    array[0] = turned
    assert equal(cache.features(CAMERA, slice(0, 29)), turned[:29])


def test_only_the_layout_that_is_known_is_read_directly(tmp_path):
    for compressors, direct in (([zarr.codecs.Crc32cCodec()], True), ("auto", False)):
        zarr.create_array(
            tmp_path / f"{direct}", shape=(8, 3), shards=(8, 3), chunks=(2, 3), dtype="f4", compressors=compressors
        )
        metadata = json.loads((tmp_path / f"{direct}" / "zarr.json").read_text())
        assert (uncompressed_layout(metadata) == ShardLayout(4, 24, bytes(4))) is direct
        assert (uncompressed_layout(metadata) is None) is not direct
