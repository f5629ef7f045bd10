"""A cache with many demos keeps its demo table in columns, and is the same cache."""

import numpy as np
import pytest
from cache_fakes import CAMERA, change_pixel, equal, extract
from fakes import make_dataset
from hypothesis import given
from hypothesis import strategies as st

from cache_pipeline.cache import manifest as manifests
from cache_pipeline.cache.compact import compact
from cache_pipeline.cache.integrity import check_integrity
from cache_pipeline.cache.manifest_store import PENDING, read_manifest
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.cache.summary import inspect_cache
from cache_pipeline.cache.table import DemoRows, DemoTable, first_rows, joined_spans, lengths, names, tasks
from cache_pipeline.errors import CorruptCacheError

LENGTHS = (6, 21, 9, 5)
digests = st.text("0123456789abcdef", min_size=32, max_size=32).filter(lambda text: text.strip("0"))
demo_rows = st.builds(
    DemoRows,
    st.integers(0, 9),
    st.text(),
    st.integers(1, 99),
    st.integers(0, 2**40),
    st.dictionaries(st.sampled_from(["rows", CAMERA, "low_dim/a"]), digests),
    st.text(),
    task=st.none() | st.text(min_size=1),
)


@given(st.lists(demo_rows))
def test_columns_hold_what_the_rows_hold(demos):
    table = DemoTable.from_bytes(DemoTable.of(demos).to_bytes())
    assert list(table) == demos
    assert table == demos
    assert [table[n] for n in range(len(demos))] == demos
    assert table[1:3] == demos[1:3]
    for column in (first_rows, lengths, names, tasks):
        assert list(column(table)) == list(column(demos))


def test_spans_that_touch_are_joined():
    demos = [DemoRows(0, "a", length, row, {}, "a") for row, length in ((0, 4), (4, 2), (8, 3), (6, 1), (7, 1))]
    assert joined_spans(demos) == [(0, 6), (8, 11), (6, 8)]
    assert joined_spans([]) == []


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """A cache whose manifest holds the demo table, and one with a table in columns."""
    dataset = make_dataset(tmp_path / "demos.hdf5", lengths=LENGTHS)
    extract(tmp_path / "rows.zarr", dataset)
    monkeypatch.setattr(manifests, "MANY_DEMOS", 2)
    extract(tmp_path / "columns.zarr", dataset)
    return dataset, tmp_path / "rows.zarr", tmp_path / "columns.zarr"


def tables(path):
    return [file.name for file in (path / "tables").iterdir()]


def test_it_is_the_same_cache(caches):
    _, plain, path = caches
    assert isinstance(read_manifest(path).demos, DemoTable)
    rows, columns = FeatureCache(plain), FeatureCache(path)
    assert rows.fingerprint == columns.fingerprint
    assert list(columns.demos) == list(rows.demos)
    assert equal(rows.features(CAMERA), columns.features(CAMERA))
    assert equal(rows.live_rows, columns.live_rows)
    assert inspect_cache(path).state == "complete"
    assert check_integrity(path).ok
    assert len(tables(path)) == 1


def test_it_is_rerun_extended_and_compacted(caches):
    dataset, plain, path = caches
    assert extract(path, dataset).units_encoded == 0
    make_dataset(dataset, lengths=(*LENGTHS, 7))
    change_pixel(dataset, "demo_1", CAMERA, 3)
    for cache in (plain, path):
        assert extract(cache, dataset).images == 2 * 7 + 21 * 2
        compact(cache)
    assert FeatureCache(path).fingerprint == FeatureCache(plain).fingerprint
    assert check_integrity(path).ok
    assert len(tables(path)) == 1


def test_a_cache_that_grows_gets_a_table_and_one_that_shrinks_loses_it(caches, monkeypatch):
    dataset, plain, path = caches
    make_dataset(dataset, lengths=(*LENGTHS, 7))
    extract(plain, dataset)
    assert len(tables(plain)) == 1
    make_dataset(dataset, lengths=LENGTHS[:2])
    extract(path, dataset)
    assert tables(path) == []


def test_an_extension_that_was_stopped_goes_on(caches, monkeypatch):
    dataset, _, path = caches
    make_dataset(dataset, lengths=(*LENGTHS, 7))

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cache_pipeline.extract.pipeline.finish", stop)
        with pytest.raises(KeyboardInterrupt):
            extract(path, dataset)
    assert (path / PENDING).exists()
    assert list(FeatureCache(path).lengths) == list(LENGTHS)
    assert extract(path, dataset).images == 0
    assert len(tables(path)) == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "another"])
def test_a_damaged_table_is_found(caches, damage):
    dataset, _, path = caches
    file = path / "tables" / tables(path)[0]
    data = file.read_bytes()
    changed = {"cut": data[:-40], "flipped": data[:90] + bytes([data[90] ^ 1]) + data[91:], "another": b"x" * 100}
    file.write_bytes(changed[damage]) if damage in changed else file.unlink()
    with pytest.raises(CorruptCacheError, match=r"manifest\.json is damaged|cannot be read"):
        FeatureCache(path)
    assert extract(path, dataset).images == 0
    assert check_integrity(path).ok


@pytest.mark.parametrize(
    "change",
    [
        {"length": np.array([1.5])},
        {"row": np.array([1, 2])},
        {"names_ends": np.array([9])},
        {"names": None},
        {"digests/rows": np.zeros((1, 3), np.uint8)},
    ],
)
def test_columns_that_do_not_fit_are_refused(change):
    columns = DemoTable.of([DemoRows(0, "a", 3, 0, {"rows": "ab" * 16}, "a")]).columns
    with pytest.raises(ValueError, match=r"demo table|column"):
        DemoTable({name: value for name, value in {**columns, **change}.items() if value is not None})
