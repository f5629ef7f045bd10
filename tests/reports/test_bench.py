import json

import pytest
from fakes import make_dataset

from cache_pipeline.errors import ConfigError
from cache_pipeline.reports import bench_encoding, bench_training
from cache_pipeline.reports.bench import BenchRow, run_bench


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("bench") / "demos.hdf5", lengths=(5, 6, 7))


@pytest.mark.parametrize(
    ("case", "rows", "limits"),
    [("extract", 2, True), ("train", 3, True), ("finetune", 2, False), ("frontier", 2, False)],
)
def test_a_case_measures_ours_beside_its_peer(dataset, tmp_path, monkeypatch, case, rows, limits):
    pytest.importorskip("robomimic")
    monkeypatch.setattr(bench_encoding, "FRAMES", 32)
    monkeypatch.setattr(bench_training, "CACHED_STEPS", 2)
    monkeypatch.setattr(bench_training, "LIVE_STEPS", 1)
    out = tmp_path / "bench.json"
    options = {"rgb_model_name": "resnet18", "batch_size": 2, "seconds": 0.001, "device": "cpu"}
    result = run_bench((case,), dataset=dataset, out=out, **options)
    assert len(result.rows) == rows
    for row in result.rows:
        assert row.ours > 0
        assert row.peer > 0
        assert row.peer_name
        assert (row.limit is not None) is limits
    assert json.loads(out.read_text()) == result.to_json()
    assert any(row.case in line for row in result.rows for line in result.lines())


def test_ratios_are_of_the_rates():
    shown = BenchRow("a case", 6.0, 2.0, "a peer", 12.0).to_json()
    assert (shown["ratio"], shown["of_limit"]) == (3.0, 0.5)
    assert BenchRow("alone", 6.0).to_json()["ratio"] is None


def test_an_unknown_case_is_refused_with_the_known_ones(dataset):
    with pytest.raises(ConfigError, match=r"no case 'speed'; available: .*frontier"):
        run_bench(
            ("speed",), dataset=dataset, rgb_model_name="resnet18", batch_size=2, seconds=0.001, out=None, device="cpu"
        )
