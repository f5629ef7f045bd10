import json

import numpy as np
import pytest
import zarr
from cache_fakes import CAMERA, equal, extract
from fakes import make_dataset

from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.cache.shards import ShardLayout, read_chunks, uncompressed_layout, write_shard

LAYOUT = ShardLayout(chunks=6, chunk_bytes=40)


@pytest.fixture
def values():
    return np.random.default_rng(0).integers(0, 256, (LAYOUT.chunks, LAYOUT.chunk_bytes), np.uint8)


def read(file, first=0, count=LAYOUT.chunks):
    out = np.empty((count, LAYOUT.chunk_bytes), np.uint8)
    read_chunks(file, LAYOUT, first, out)
    return out


def test_chunks_come_back_wherever_one_begins(tmp_path, values):
    write_shard(tmp_path / "s", LAYOUT, values)
    for first in range(LAYOUT.chunks):
        for count in range(1, LAYOUT.chunks - first + 1):
            assert equal(read(tmp_path / "s", first, count), values[first : first + count])


def test_any_flipped_byte_and_any_cut_is_found(tmp_path, values):
    write_shard(tmp_path / "s", LAYOUT, values)
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
        assert (uncompressed_layout(metadata) == ShardLayout(4, 24)) is direct
        assert (uncompressed_layout(metadata) is None) is not direct
