"""A cache as zarr, xarray and tensorstore show it, without this package."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tensorstore
import xarray
import zarr
from cache_fakes import CAMERA, NARROW, OTHER, TINY, equal, extract, outputs
from fakes import make_dataset

from cache_pipeline.cache import metadata
from cache_pipeline.cache.compact import compact
from cache_pipeline.cache.integrity import check_integrity
from cache_pipeline.cache.manifest import CameraEntry
from cache_pipeline.cache.manifest_store import read_manifest, write_manifest
from cache_pipeline.cache.metadata import dimension_names, metadata_files
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.errors import IncompleteCacheError
from cache_pipeline.extract import pipeline, worker
from cache_pipeline.extract.verify import verify
from cache_pipeline.files import digest

NAMES = ["demo_0", "demo_3", "demo_5"]
LENGTHS = (20, 7, 9)
ENCODERS = {CAMERA: TINY, OTHER: NARROW}


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "demos.hdf5", lengths=LENGTHS, names=NAMES)


@pytest.fixture
def out(tmp_path, dataset):
    extract(tmp_path / "cache.zarr", dataset, views=2, encoders=ENCODERS)
    return tmp_path / "cache.zarr"


def live_rows(attributes):
    """Rows that belong to a demo, by the attributes alone."""
    spans = zip(attributes["demo_starts"], attributes["demo_lengths"], strict=True)
    return np.concatenate([np.arange(start, start + length) for start, length in spans])


def check_against_reader(path):
    """Attributes and values, as zarr and xarray show them, are those of FeatureCache."""
    cache, group = FeatureCache(path), zarr.open_group(path, mode="r")
    assert group.attrs["complete"] is True
    assert group.attrs["fingerprint"] == cache.fingerprint
    assert group.attrs["rows"] == cache.lengths.sum()
    assert group.attrs["demo_names"] == [demo.name for demo in cache.demos]
    assert group.attrs["cameras"] == list(cache.cameras)
    assert group.attrs["filter_keys"] == {key: list(members) for key, members in cache.masks.items()}
    rows = live_rows(group.attrs)
    assert np.array_equal(rows, cache.live_rows)
    with xarray.open_datatree(path, engine="zarr") as tree:
        assert tree.attrs == dict(group.attrs)
        for camera, entry in cache.cameras.items():
            assert tree["features"][camera].sizes["view"] == entry.views
            for view in range(entry.views):
                wanted = cache.features(camera, view=view)
                assert equal(group[f"features/{camera}"][view][rows], wanted)
                assert equal(tree["features"][camera].isel(view=view, row=rows).values, wanted)
        for name in ("actions", "rewards", "dones", *(f"low_dim/{key}" for key in cache.low_dim)):
            assert equal(tree[name].isel(row=rows).values, cache.array(name))
    assert check_integrity(path).ok


def test_zarr_and_xarray_show_what_the_reader_gives(out):
    check_against_reader(out)


def test_each_group_opens_in_xarray_by_itself(out):
    with xarray.open_zarr(out) as root:
        assert root.sizes == {"row": 48, "action": 7}
    with xarray.open_zarr(out, group="features") as features:
        assert features[CAMERA].dims == ("view", "row", f"{CAMERA}_feature")
        assert features[CAMERA].attrs["architecture"] == "Tiny"
        assert len(features[CAMERA].attrs["axes"]) == features[CAMERA].ndim
    with xarray.open_zarr(out, group="low_dim") as low_dim:
        assert low_dim["robot0_eef_pos"].attrs["obs_key"] == "robot0_eef_pos"


def test_tensorstore_reads_every_array(out):
    cache = FeatureCache(out)
    for name in metadata.array_specs(cache.manifest):
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(out / name)}}
        stored = tensorstore.open(spec, read=True).result()
        assert stored.domain.labels == dimension_names(cache.manifest)[name]
        rows = np.asarray(stored.read().result()).take(cache.live_rows, stored.domain.labels.index("row"))
        if name.startswith("features/"):
            wanted = cache.views(name.removeprefix("features/"))
        elif name.startswith("frame_digests/"):
            wanted = cache.frame_digests(name.removeprefix("frame_digests/"))
        else:
            wanted = cache.array(name)
        assert equal(rows, wanted)


def test_axes_of_one_name_have_one_length_whatever_the_keys_are_called(out):
    manifest = read_manifest(out)
    entry = manifest.cameras[CAMERA]
    cameras: dict[str, CameraEntry] = {
        "a": entry._replace(views=1, feature_shape=(6, 2, 3)),
        "a_feature": entry._replace(feature_shape=(4,)),
        "view": entry,
    }
    low_dim = {"row": (3,), "action": (2, 2), "a_h": (5,), "a_h_": (), "row_dim_0": (4, 1, 2, 3)}
    odd = replace(manifest, cameras=cameras, low_dim=low_dim)
    names, lengths = dimension_names(odd), {}
    for path, content in metadata_files(odd).items():
        node = json.loads(content)
        if node["node_type"] == "array":
            assert tuple(node["dimension_names"]) == names[path.removesuffix("/zarr.json")]
            for name, length in zip(node["dimension_names"], node["shape"], strict=True):
                assert lengths.setdefault(name, length) == length, name
    assert not set(lengths) & {*cameras, *low_dim, "actions", "rewards", "dones"}


def test_attributes_follow_demos_that_come_and_go_filter_keys_compaction_and_overwriting(out, dataset):
    for lengths, names in (((20, 9), NAMES[::2]), ((20, 9, 4), [*NAMES[::2], "demo_8"])):
        make_dataset(dataset, lengths=lengths, names=names)
        extract(out, dataset, views=2, encoders=ENCODERS)
        check_against_reader(out)
    make_dataset(dataset, lengths=(20, 9, 4), names=[*NAMES[::2], "demo_8"], masks={"few": ["demo_8"]})
    assert extract(out, dataset, views=2, encoders=ENCODERS).images == 0
    check_against_reader(out)
    compact(out)
    check_against_reader(out)
    assert zarr.open_group(out, mode="r").attrs["demo_starts"] == [0, 20, 29]
    extract(out, dataset, encoders=ENCODERS, overwrite=True)
    check_against_reader(out)
    assert zarr.open_group(out, mode="r").attrs["views"] == {CAMERA: 1, OTHER: 1}


def shown(path):
    """Everything that zarr and xarray show of a cache."""
    with xarray.open_datatree(path, engine="zarr") as tree:
        values = {f"{node.path}/{name}": node[name].values for node in tree.subtree for name in node.data_vars}
        return json.dumps(tree.attrs), {name: (value.shape, value.tobytes()) for name, value in values.items()}


def stop(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["read_rows", "finish", "complete_cache"])
def test_a_killed_extension_shows_what_was_complete(tmp_path, out, dataset, monkeypatch, where):
    before = shown(out)
    make_dataset(dataset, lengths=(20, 9, 30), names=[*NAMES[::2], "demo_8"], low_dim={"robot0_eef_pos": 3, "new": 2})
    options = {"views": 3, "encoders": ENCODERS, "low_dim_keys": ("robot0_eef_pos", "new")}
    with monkeypatch.context() as patch:
        patch.setattr(worker if hasattr(worker, where) else pipeline, where, stop)
        with pytest.raises(KeyboardInterrupt):
            extract(out, dataset, **options)
    assert shown(out) == before
    extract(out, dataset, **options)
    check_against_reader(out)


def test_a_kill_between_attributes_and_manifest_shows_rows_that_are_stored(tmp_path, out, dataset, monkeypatch):
    old = read_manifest(out)
    make_dataset(dataset, lengths=(20, 9, 30), names=[*NAMES[::2], "demo_8"])
    with monkeypatch.context() as patch:
        patch.setattr(metadata, "write_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            extract(out, dataset, views=2, encoders=ENCODERS)
    attributes = dict(zarr.open_group(out, mode="r").attrs)
    assert read_manifest(out) == old
    assert attributes["fingerprint"] != old.fingerprint
    assert check_integrity(out).ok
    assert FeatureCache(out).features(CAMERA).shape == (36, 6)
    extract(tmp_path / "at_once.zarr", dataset, views=2, encoders=ENCODERS)
    wanted = FeatureCache(tmp_path / "at_once.zarr")
    assert attributes["fingerprint"] == wanted.fingerprint
    stored = zarr.open_group(out, mode="r")[f"features/{CAMERA}"][1]
    assert equal(stored[live_rows(attributes)], wanted.features(CAMERA, view=1))
    extract(out, dataset, views=2, encoders=ENCODERS)
    assert dict(zarr.open_group(out, mode="r").attrs) == attributes
    check_against_reader(out)


def test_a_given_up_extension_leaves_no_trace_in_the_attributes(out, dataset, monkeypatch):
    before, demos = shown(out), dataset.read_bytes()
    make_dataset(dataset, lengths=(20, 9, 30), names=[*NAMES[::2], "demo_8"])
    with monkeypatch.context() as patch:
        patch.setattr(metadata, "write_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            extract(out, dataset, views=2, encoders=ENCODERS)
    dataset.write_bytes(demos)
    extract(out, dataset, views=2, encoders=ENCODERS)
    assert shown(out) == before
    check_against_reader(out)


def test_an_unfinished_first_extraction_names_no_demo(tmp_path, dataset, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            extract(tmp_path / "new.zarr", dataset)
    with pytest.raises(IncompleteCacheError):
        FeatureCache(tmp_path / "new.zarr")
    with xarray.open_datatree(tmp_path / "new.zarr", engine="zarr") as tree:
        assert tree.attrs["complete"] is False
        assert not {"fingerprint", "rows", "demo_names"} & set(tree.attrs)
    extract(tmp_path / "new.zarr", dataset)
    check_against_reader(tmp_path / "new.zarr")


def make_old(path):
    """Turns a cache into one of earlier versions: no attributes, and axes of all arrays share their names."""
    manifest = read_manifest(path)
    old = {}
    for file in path.rglob("zarr.json"):
        node = json.loads(file.read_bytes())
        node.pop("consolidated_metadata", None)
        node["attributes"] = {}
        if node["node_type"] == "array":
            lead = ["view", "row"] if file.parent.parent.name == "features" else ["row"]
            node["dimension_names"] = [*lead, *("feature", "h", "w")[: len(node["shape"]) - len(lead)]]
        file.write_bytes(json.dumps(node, indent=2).encode())
        old[str(file.relative_to(path))] = digest(file.read_bytes())
    write_manifest(path, replace(manifest, metadata={**manifest.metadata, **old}))


def test_a_cache_of_an_earlier_version_opens_is_verified_and_extended(tmp_path, out, dataset):
    factories = tuple(spec.factory for spec in ENCODERS.values())
    features, before = FeatureCache(out).features(OTHER, view=1), outputs(out)
    make_old(out)
    files = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert equal(FeatureCache(out).features(OTHER, view=1), features)
    assert check_integrity(out).ok
    assert verify(out, rows=8, encoder=factories).ok
    assert extract(out, dataset, views=2, encoders=ENCODERS).units_encoded == 0
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == files
    assert outputs(out) == before
    make_dataset(dataset, lengths=(*LENGTHS, 5), names=[*NAMES, "demo_8"])
    extract(out, dataset, views=2, encoders=ENCODERS)
    extract(tmp_path / "at_once.zarr", dataset, views=2, encoders=ENCODERS)
    assert FeatureCache(out).fingerprint == FeatureCache(tmp_path / "at_once.zarr").fingerprint
    check_against_reader(out)


def test_compacting_a_cache_of_an_earlier_version_gives_it_attributes(out):
    make_old(out)
    compact(out)
    check_against_reader(out)
