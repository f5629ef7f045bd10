"""docs/cache-format.md is right: its own reader, which uses nothing of the package, reads what FeatureCache reads."""

import re
from pathlib import Path

import numpy as np
import pytest
from cache_fakes import CAMERA, NARROW, OTHER, TINY, equal, extract
from fakes import make_dataset

from cache_pipeline.cache import manifest as manifests
from cache_pipeline.cache.arrays import array_specs, unit_arrays
from cache_pipeline.cache.compact import compact
from cache_pipeline.cache.layout import Unit
from cache_pipeline.cache.ledger import read_record
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.cache.table import DemoTable
from cache_pipeline.encoders.image_encoder import EncoderSpec

DOCUMENT = (Path(__file__).parents[2] / "docs" / "cache-format.md").read_text(encoding="utf-8")
WITH_ZARR, READER = re.findall(r"^```python\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
MAP = EncoderSpec(weights="random", cut="layer1")


@pytest.fixture(scope="module")
def reader():
    assert "cache_pipeline" not in READER
    names = {}
    exec(compile(READER, "docs/cache-format.md", "exec"), names)
    return names


@pytest.fixture
def path(tmp_path):
    """Two views, two widths, an extension, a removed demo, and a name that is not ASCII."""
    dataset, path = tmp_path / "demos.hdf5", tmp_path / "cache.zarr"
    options = {"views": 2, "encoders": {CAMERA: TINY, OTHER: NARROW}}
    make_dataset(dataset, lengths=(20, 7, 9), names=["demo_0", "demo_1", "démo_2"], masks={})
    extract(path, dataset, **options)
    make_dataset(dataset, lengths=(20, 9, 30), names=["demo_0", "démo_2", "demo_3"], masks={"train": ["demo_3"]})
    extract(path, dataset, **options)
    return path


def check(reader, path):
    cache = FeatureCache(path)
    manifest = reader["read_manifest"](path)
    assert reader["fingerprint"](manifest) == manifest["fingerprint"] == cache.fingerprint
    for name in array_specs(cache.manifest):
        kind, _, key = name.partition("/")
        if kind == "features":
            for view in range(cache.cameras[key].views):
                assert equal(reader["read_array"](path, name, view), cache.features(key, view=view))
            continue
        values = reader["read_array"](path, name)
        assert equal(values, cache.frame_digests(key) if kind == "frame_digests" else cache.array(name))
        for demo, rows in zip(cache.demos, np.split(values, cache.packed_starts[1:]), strict=True):
            assert demo.digests[name.removeprefix("frame_digests/")] == reader["digest"](rows.tobytes())


def test_the_documents_reader_reads_an_extended_and_a_compacted_cache(reader, path):
    check(reader, path)
    compact(path)
    check(reader, path)


def test_the_documents_reader_reads_a_demo_table_in_columns(reader, path, monkeypatch):
    monkeypatch.setattr(manifests, "MANY_DEMOS", 2)
    compact(path)
    assert isinstance(FeatureCache(path).demos, DemoTable)
    check(reader, path)


def test_the_documents_reader_reads_maps(reader, tmp_path):
    dataset = make_dataset(tmp_path / "demos.hdf5", lengths=(5,), names=["demo_0"], masks={})
    extract(tmp_path / "map.zarr", dataset, encoders=MAP, cameras=(CAMERA,), shard_rows=8)
    assert len(FeatureCache(tmp_path / "map.zarr").cameras[CAMERA].feature_shape) == 3
    check(reader, tmp_path / "map.zarr")


def test_the_documents_reader_finds_damage(reader, path):
    shard = path / "features" / CAMERA / "c" / "1" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(AssertionError):
        reader["read_array"](path, f"features/{CAMERA}", 1)
    manifest = (path / "manifest.json").read_text(encoding="utf-8")
    (path / "manifest.json").write_text(manifest.replace('"shard_rows": 16', '"shard_rows": 8'), encoding="utf-8")
    with pytest.raises(AssertionError):
        reader["read_manifest"](path)


def test_units_files_and_ledger_are_as_the_document_tells(reader, path):
    manifest = reader["read_manifest"](path)
    documented = set(re.findall(r"`(\w+)`", DOCUMENT[DOCUMENT.index("## manifest.json") : DOCUMENT.index("## Arrays")]))
    assert set(manifest) <= documented
    assert {key for camera in manifest["cameras"].values() for key in camera} <= documented
    for name, output in manifest["units"].items():
        unit = Unit.parse(name)
        record = read_record(path, unit)
        assert record is not None
        assert record.output == output
        arrays = unit_arrays(FeatureCache(path).manifest, unit)
        assert reader["unit_of"](arrays[0], unit.block, unit.view) == (name, arrays)
    for file, recorded in manifest["metadata"].items():
        assert reader["digest"]((path / file).read_bytes()) == recorded
    files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    others = {file for file in files if not re.match(r"ledger/|.*/c/", file)} - set(manifest["metadata"])
    assert others == {"manifest.json"}


def test_the_documents_lines_for_zarr_and_xarray_run(path):
    names = {"path": path, "camera": CAMERA}
    exec(compile(WITH_ZARR, "docs/cache-format.md", "exec"), names)
    cache = FeatureCache(path)
    assert equal(names["features"], cache.features(CAMERA, slice(0, 20)))
    assert equal(names["actions"], cache.array("actions", slice(0, 20)))
