"""Parts of one extraction, started one by one: each makes other units of one cache, and the last one completes it."""

import threading
import time

import pytest
from cache_fakes import CAMERA, SLOW, config, extract, outputs
from typer.testing import CliRunner

from cache_pipeline.cache.compact import compact
from cache_pipeline.cache.integrity import check_integrity
from cache_pipeline.cache.manifest_store import MANIFEST, PENDING, read_manifest
from cache_pipeline.cache.store import FolderStore
from cache_pipeline.cli import app
from cache_pipeline.errors import CacheLockedError, IncompleteCacheError, OptionError
from cache_pipeline.extract import pipeline
from cache_pipeline.extract.parts import Part, part_of_job
from cache_pipeline.extract.prepare import prepare

SLURM = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4"}


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_parts_one_after_another_give_the_cache_of_one_process(dataset, out, whole, order):
    results = [extract(out, dataset, views=2, part=f"{number}/3") for number in order]
    assert [result.fingerprint for result in results] == [None, None, whole["fingerprint"]]
    assert results[0].units_missing > results[1].units_missing > results[2].units_missing == 0
    assert sum(result.units_encoded for result in results) == len(whole["units"])
    assert "of other parts to come" in results[0].lines()[0]
    assert outputs(out) == whole
    assert check_integrity(out).ok
    assert not (out / PENDING).exists()
    assert [file.name for file in out.parent.iterdir()] == ["cache.zarr"]
    assert extract(out, dataset, views=2, part="1/3").units_encoded == 0


def test_parts_at_once_give_the_cache_of_one_process_and_keep_other_writers_out(dataset, out):
    slow = {"views": 2, "encoders": SLOW}
    extract(out.with_name("whole.zarr"), dataset, **slow)
    results, errors = [], []

    def run(part):
        try:
            results.append(extract(out, dataset, part=part, **slow))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(f"{number}/2",)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    while not list(out.glob("ledger/**/*.json")):
        time.sleep(0.01)
    with pytest.raises(CacheLockedError, match="is being written by process"):
        extract(out, dataset, **slow)
    with pytest.raises(CacheLockedError):
        compact(out)
    with pytest.raises(CacheLockedError, match="in parts with other options or other data"):
        extract(out, dataset, part="1/2", **{**slow, "cameras": (CAMERA,)})
    for thread in threads:
        thread.join()
    assert not errors
    assert any(result.fingerprint for result in results)
    assert outputs(out) == outputs(out.with_name("whole.zarr"))
    assert not out.with_name(".cache.zarr.lock").exists()


def test_a_part_is_refused_while_another_kind_of_writer_is_there(dataset, out, monkeypatch):
    monkeypatch.setattr("cache_pipeline.cache.lock.UNTOLD_HOLDER_S", 0.2)
    thread = threading.Thread(target=extract, args=(out, dataset), kwargs={"encoders": SLOW, "views": 2})
    thread.start()
    while not list(out.glob("ledger/**/*.json")):
        time.sleep(0.01)
    with pytest.raises(CacheLockedError, match=r"is being written by process \d+ on .*, not in parts; wait"):
        extract(out, dataset, part="1/2")
    thread.join()
    assert extract(out, dataset, encoders=SLOW, views=2, part="1/2").units_encoded == 0


def test_two_parts_may_complete_the_cache_at_the_same_moment(dataset, out, whole, monkeypatch):
    complete = pipeline.complete_cache

    def twice(*args):
        complete(*args)
        complete(*args)

    monkeypatch.setattr(pipeline, "complete_cache", twice)
    extract(out, dataset, views=2, part="1/1")
    assert outputs(out) == whole
    assert not (out / PENDING).exists()


def test_an_extension_in_parts_keeps_the_old_cache_until_all_are_done(dataset, out, whole):
    extract(out, dataset)
    before = outputs(out)
    assert extract(out, dataset, views=2, part="2/2").fingerprint is None
    assert outputs(out) == before
    extract(out, dataset, views=2, part="1/2")
    assert outputs(out) == whole


def test_finish_says_what_is_missing_and_completes_a_cache_whose_parts_are_done(dataset, out, whole, monkeypatch):
    extract(out, dataset, views=2, part="1/2")
    with pytest.raises(IncompleteCacheError, match=r"unfinished: \d+ of 45 units are missing \(.*\); run the parts"):
        extract(out, dataset, views=2, finish=True)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "missing_units", lambda prepared: ["a unit"])  # the part is killed before it looks
        assert extract(out, dataset, views=2, part="2/2").fingerprint is None
    assert not (out / MANIFEST).exists()
    result = extract(out, dataset, views=2, finish=True)
    assert (result.units_encoded, result.fingerprint) == (0, whole["fingerprint"])
    assert outputs(out) == whole


def test_a_later_part_takes_the_decisions_of_the_first(dataset, out):
    extract(out, dataset, part="1/2", batch_size=3, shard_rows=8)
    extract(out, dataset, part="2/2", batch_size=None, shard_rows=None)
    assert (read_manifest(out).batch_size, read_manifest(out).shard_rows) == (3, 8)


def test_every_part_gets_an_equal_share_of_each_camera(dataset, out):
    shares = []
    for number in range(1, 4):
        jobs = prepare(config(out, dataset, part=Part(number, 3), shard_rows=4), FolderStore(out)).work.jobs
        shares.append([sum(job.camera == camera for job in jobs) for camera in ("", CAMERA)])
    for counts in zip(*shares, strict=True):
        assert max(counts) - min(counts) <= 1
    assert sum(map(sum, shares)) == 2 * 20


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        (SLURM, Part(3, 4)),
        ({**SLURM, "SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_STEP": "2"}, Part(3, 4)),
        ({"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "16"}, Part(1, 16)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, Part(4, 4)),
    ],
)
def test_job_schedulers_tell_the_part(environment, part):
    assert part_of_job(environment) == part


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, "--part auto finds no part in the environment"),
        ({"JOB_COMPLETION_INDEX": "0"}, "JOB_COMPLETIONS is not set; set it in the job's template"),
        ({**SLURM, "SLURM_ARRAY_TASK_ID": "90"}, "SLURM_ARRAY_TASK_ID is outside the 4 parts"),
        ({"RANK": "x", "WORLD_SIZE": "4"}, "RANK is 'x', not a number"),
    ],
)
def test_an_environment_that_tells_no_part_is_an_error_in_one_line(environment, told):
    with pytest.raises(OptionError, match=told) as caught:
        part_of_job(environment)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--part 5/4", "--part 5/4: parts are numbered from 1 to their count"),
        ("--part 0/4", "--part 0/4: parts are numbered from 1"),
        ("--part 3", "--part 3 is not a part; give its number and how many there are, such as 3/16"),
        ("--part 1/2 --overwrite", "--overwrite does not work in parts"),
        ("--part 1/2 --finish", "--part and --finish contradict each other"),
        ("--engine ray --part 1/2", "--engine ray hands out units and devices by itself; leave --part out"),
        ("--engine ray --devices cpu", "leave --devices out"),
        ("--devices cpu --workers 2", "leave --workers out"),
        ("--devices cpu,cpu", "name each device once"),
        ("--devices none", "--devices names no device"),
        ("--ray-address head:1", "--ray-address has no effect: only --engine ray"),
        ("--part 1/2 --dry-run", "--part has no effect: --dry-run"),
    ],
)
def test_options_that_contradict_each_other_are_usage_errors_in_one_line(dataset, out, words, told):
    result = CliRunner().invoke(app, ["extract-features", str(dataset), "--out", str(out), *words.split()])
    assert result.exit_code == 2, result.output
    assert told in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not out.exists()
