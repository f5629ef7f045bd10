"""Every engine gives the cache that one process gives, whatever dies on the way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cache_fakes import CAMERA, OVERFLOWING, SLOW, extract, outputs

from cache_pipeline.cache.integrity import check_integrity
from cache_pipeline.cache.manifest_store import MANIFEST
from cache_pipeline.errors import UnitsFailedError
from cache_pipeline.extract import lifeline, processes

TESTS = Path(__file__).parents[1]


@pytest.fixture
def started(monkeypatch):
    """The workers in the order of their start."""
    workers = []
    start = processes._Process.start

    def kept(self):
        start(self)
        workers.append(self._process)

    monkeypatch.setattr(processes._Process, "start", kept)
    return workers


def test_two_workers_give_the_cache_of_one_process(dataset, out, whole):
    result = extract(out, dataset, views=2, workers=2)
    assert outputs(out) == whole
    assert check_integrity(out).ok
    assert result.units_encoded == len(whole["units"])
    assert min(result.read_s, result.encode_s, result.write_s) > 0
    assert extract(out, dataset, views=2, workers=2).units_encoded == 0
    assert [file.name for file in out.parent.iterdir()] == ["cache.zarr"]


def test_the_units_of_a_killed_worker_are_made_by_others(dataset, out, whole, started, monkeypatch, caplog):
    done = processes._Pool._on_done
    killed = []

    def kill_the_first(self, worker, job):
        done(self, worker, job)
        if not killed:
            killed.append(worker)
            os.kill(worker._process.pid, signal.SIGKILL)

    monkeypatch.setattr(processes._Pool, "_on_done", kill_the_first)
    extract(out, dataset, views=2, workers=2)
    assert outputs(out) == whole
    assert "was killed, perhaps for lack of memory; its" in caplog.text
    assert len(started) == 3
    assert all(process._process.poll() is not None for process in started)


def test_a_unit_that_fails_three_times_is_set_aside_and_named_and_the_others_are_done(dataset, out, caplog):
    with pytest.raises(UnitsFailedError) as caught:
        extract(out, dataset, devices=("cpu",), encoders=OVERFLOWING, cameras=(CAMERA,))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("features/agentview_image/0/0 could not be made in 3 attempts: ")
    assert "demo_0: the feature of agentview_image frame" in message
    assert "nor could 4 more" in message
    assert not (out / MANIFEST).exists()
    assert len(list(out.glob("ledger/frames/**/*.json"))) == 5
    assert len(list(out.glob("ledger/steps/*.json"))) == 5


def test_a_worker_that_always_dies_ends_in_one_line(dataset, out, monkeypatch):
    monkeypatch.setattr(lifeline, "_START", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(UnitsFailedError, match=r"worker \d on cpu was killed, .* no worker is left; finished"):
        extract(out, dataset, workers=2)
    assert extract(out, dataset).units_encoded > 0


RUN = """
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.default_int_handler)
sys.path.insert(0, sys.argv[1])
import cache_fakes
from cache_pipeline.extract.pipeline import extract_features
extract_features(cache_fakes.config(*sys.argv[2:], views=2, workers=2, encoders=cache_fakes.SLOW), progress=False)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_no_worker_outlives_its_parent_and_the_next_run_goes_on(dataset, out, number):
    parent = subprocess.Popen(
        [sys.executable, "-c", RUN, str(TESTS), str(out), str(dataset)],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "MARK": str(out)},
    )
    until(lambda: list(out.glob("ledger/**/*.json")), parent)
    assert len(processes_of(out)) >= 3
    parent.send_signal(number)
    parent.wait(240)
    until(lambda: not processes_of(out))
    assert not (out / MANIFEST).exists()
    assert extract(out, dataset, views=2, encoders=SLOW).units_reused > 0
    assert check_integrity(out).ok


def processes_of(out: Path) -> list[int]:
    """Processes whose environment names the cache: a run, its workers and their readers."""
    found = []
    for process in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if f"MARK={out}".encode() in Path(f"/proc/{process}/environ").read_bytes():
                found.append(int(process))
        except OSError:
            continue
    return found


def until(condition, process=None, seconds=240):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        assert process is None or process.poll() is None, "the process ended too early"
        time.sleep(0.02)
