import errno

import pytest
from cache_fakes import extract, outputs
from fakes import make_dataset

from cache_pipeline.cache import shards
from cache_pipeline.cache.manifest_store import MANIFEST
from cache_pipeline.errors import CacheError


def test_a_full_disk_is_a_cache_error_and_the_next_run_continues(tmp_path, monkeypatch):
    dataset = make_dataset(tmp_path / "demos.hdf5", lengths=(17, 30, 9))
    out, whole = tmp_path / "cache.zarr", tmp_path / "whole.zarr"
    real, written = shards.write_shard, []

    def until_full(*args, **kwargs):
        if len(written) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(args)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("cache_pipeline.cache.arrays.write_shard", until_full)
        with pytest.raises(CacheError, match=r"no space left for .*cache\.zarr"):
            extract(out, dataset)
    assert len(written) == 4
    assert not (out / MANIFEST).exists()
    assert extract(out, dataset).units_reused > 0
    extract(whole, dataset)
    assert outputs(out) == outputs(whole)
