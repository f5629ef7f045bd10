import json
import sys
import time
from functools import partial

import pytest
import torch
from cache_fakes import TINY, extract
from fakes import make_dataset

from cache_pipeline.encoders.precision import resolve_precision
from cache_pipeline.encoders.view_spec import ViewSpec
from cache_pipeline.errors import ConfigError
from cache_pipeline.reports.bench import encoding as bench_encoding
from cache_pipeline.reports.bench import run as bench_run
from cache_pipeline.reports.bench import training as bench_training
from cache_pipeline.reports.bench.run import BenchRow, BenchSetup, run_bench


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("bench") / "demos.hdf5", lengths=(5, 6, 7))


PRECISIONS = {resolve_precision("auto", torch.device("cpu")), "fp32"}
"""Those that are measured: on a CPU without fast bf16 it is one."""


@pytest.mark.parametrize(
    ("case", "rows", "limits"),
    [
        (bench_encoding.extract, len(PRECISIONS), True),
        (bench_training.train, 3, True),
        (bench_training.stream, 1, False),
        (bench_training.finetune, 2, False),
        (bench_training.frontier, 2, False),
    ],
)
def test_a_case_measures_ours_beside_its_peer(dataset, tmp_path, monkeypatch, case, rows, limits):
    pytest.importorskip("robomimic")
    monkeypatch.setattr(sys.modules[case.__module__], "side_by_side", in_this_process)
    small = BenchSetup(
        dataset=dataset, folder=tmp_path, batch_size=2, seconds=0.001, frames=32, cached_steps=2, live_steps=1
    )
    found = case(small)
    assert len(found) == rows
    for row in found:
        assert row.ours > 0
        assert row.peer > 0
        assert row.peer_name
        assert (row.limit is not None) is limits


def test_streaming_is_measured_at_another_place_too(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_training, "side_by_side", in_this_process)
    store = tmp_path / "store" / "stream.zarr"
    small = BenchSetup(
        dataset=dataset, folder=tmp_path, store=str(store), batch_size=2, seconds=0.001, frames=32, cached_steps=2
    )
    found = bench_training.stream(small)
    assert [row.case.partition("cache from ")[2] for row in found] == ["a folder, steps/s", f"{store}, steps/s"]
    assert not store.exists() or not list(store.iterdir())
    store.mkdir(exist_ok=True)
    (store / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="there is something at"):
        bench_training.stream(small)
    assert (store / "mine.txt").read_text() == "mine"
    with pytest.raises(ConfigError, match="bench stream --store"):
        run_bench(
            ("load",),
            dataset=dataset,
            store=str(store),
            rgb_model_name="resnet18",
            batch_size=2,
            seconds=0.001,
            out=None,
            device="cpu",
        )


def test_loading_is_measured_on_a_dataset_that_is_too_small_for_the_large_cache(dataset, tmp_path, monkeypatch):
    asked = []

    def extraction(setup, out, **options):
        asked.append(options.get("views", 1))
        spec = {
            "encoders": TINY,
            "cameras": ("agentview_image",),
            "views": min(asked[-1], 3),
            "view_spec": ViewSpec(seed=1),
        }
        return extract(out, setup.dataset, **spec).images

    monkeypatch.setattr(bench_encoding, "side_by_side", in_this_process)
    monkeypatch.setattr(bench_encoding, "_extraction", extraction)
    found = bench_encoding.load(BenchSetup(dataset=dataset, folder=tmp_path, batch_size=2, seconds=0.001))
    assert [row.case.split(",")[0] for row in found] == ["load avgpool", "load layer3"]
    assert asked == [1, 1, bench_encoding.MOST_VIEWS]


def in_this_process(contenders, seconds):
    """What ``side_by_side`` does, without a process for each, which takes seconds to begin."""
    rates = {}
    for name, prepare in contenders.items():
        work = prepare()
        started = time.perf_counter()
        rates[name] = sum(next(work) for _ in range(2)) / (time.perf_counter() - started)
    return rates


def test_rows_are_shown_and_kept(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_run, "BenchSetup", partial(BenchSetup, frames=64))
    out = tmp_path / "bench.json"
    result = run_bench(
        ("encode",), dataset=dataset, rgb_model_name="resnet18", batch_size=2, seconds=0.001, out=out, device="cpu"
    )
    assert json.loads(out.read_text()) == result.to_json()
    assert all(any(row.case in line for line in result.lines()) for row in result.rows)
    table = result.lines()[1 : 2 + len(result.rows)]
    assert len({len(line) for line in table}) == 1, "columns do not line up"


def test_ratios_are_of_the_rates():
    shown = BenchRow("a case", 6.0, 2.0, "a peer", 12.0).to_json()
    assert (shown["ratio"], shown["of_limit"]) == (3.0, 0.5)
    assert BenchRow("alone", 6.0).to_json()["ratio"] is None


def test_an_unknown_case_is_refused_with_the_known_ones(dataset):
    with pytest.raises(ConfigError, match=r"no case 'speed'; available: .*frontier"):
        run_bench(
            ("speed",), dataset=dataset, rgb_model_name="resnet18", batch_size=2, seconds=0.001, out=None, device="cpu"
        )
