"""A command that writes one file leaves alone what is not its own: refused in one line, byte for byte as it was."""

import errno
import json
import os
import shutil

import h5py
import pytest
from cache_fakes import CAMERA
from fakes import make_dataset
from typer.testing import CliRunner

from cache_pipeline.cli import app
from cache_pipeline.errors import CachePipelineError, ConfigError
from cache_pipeline.files import PNG, output_file

RANDOM = ["--no-pretrained-encoder", "--device", "cpu", "--precision", "fp32"]


def run(*args):
    return CliRunner().invoke(app, ["--quiet", *map(str, args)])


def refused(result):
    assert result.exit_code == 1, (result.output, result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A dataset, a cache of it and a run trained on the cache."""
    folder = tmp_path_factory.mktemp("made")
    dataset, cache, trained = folder / "data.hdf5", folder / "data.zarr", folder / "run"
    make_dataset(dataset)
    assert run("extract-features", dataset, "--out", cache, "--cameras", CAMERA, *RANDOM).exit_code == 0
    result = run("train", "--from-cache", cache, "--out", trained, "--steps", 2, "--batch-size", 4, "--device", "cpu")
    assert result.exit_code == 0, result.output
    return dataset, cache, trained


def commands(made):
    """Every command that writes one file, up to the path of that file."""
    dataset, cache, trained = made
    return {
        "report": ["report", trained, "--out"],
        "inspect": ["inspect", cache, "--views"],
        "probe": ["probe", cache, "--device", "cpu", "--out"],
        "bench": ["bench", "load", "--dataset", dataset, "--seconds", 0.1, "--out"],
        "cache export hdf5": ["cache", "export", cache, "--out"],
        "cache export npz": ["cache", "export", cache, "--out"],
        "export": ["export", trained, "--out"],
        "collect": ["collect", "--demos", 1, "--out"],
    }


ENDINGS = {"cache export hdf5": ".hdf5", "cache export npz": ".npz", "export": ".pt2"}
NAMES = ["report", "inspect", "probe", "bench", "cache export hdf5", "cache export npz", "export", "collect"]


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_another_kind_is_never_replaced(tmp_path, made, name, overwrite):
    for content in (b"years of work", made[0].read_bytes()):
        if name == "collect" and content != b"years of work":
            continue  # a dataset is what collect writes
        target = tmp_path / f"target{ENDINGS.get(name, '')}"
        target.write_bytes(content)
        assert str(target) in refused(run(*commands(made)[name], target, *overwrite))
        assert target.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == [target.name]


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("name", ["report", "bench", "inspect", "probe"])
def test_files_of_runs_and_caches_are_never_replaced(made, name, overwrite):
    _, cache, trained = made
    owned = [trained / "run.json", trained / "metrics.csv", cache / "manifest.json", cache / "zarr.json"]
    for target in [*owned, *trained.glob("*.safetensors"), *trained.glob("checkpoints/*.json")]:
        before = target.read_bytes()
        refused(run(*commands(made)[name], target, *overwrite))
        assert target.read_bytes() == before


@pytest.mark.parametrize("name", ["report", "inspect", "cache export hdf5", "cache export npz", "export"])
def test_a_file_of_the_same_kind_is_replaced_only_when_asked(tmp_path, made, name):
    target = tmp_path / f"target{ENDINGS.get(name, '')}"
    command = [*commands(made)[name], target]
    assert run(*command).exit_code == 0
    before = target.stat().st_ino
    assert "--overwrite" in refused(run(*command))
    assert target.stat().st_ino == before
    assert run(*command, "--overwrite").exit_code == 0
    assert target.stat().st_ino != before


def test_an_export_never_replaces_the_source_of_its_cache(tmp_path, made):
    dataset, cache = tmp_path / "data.hdf5", tmp_path / "cache.zarr"
    shutil.copy(made[0], dataset)
    with h5py.File(dataset, "r+") as file:
        file["data"].attrs["feature_cache_fingerprint"] = "an earlier export with images added"
    assert run("extract-features", dataset, "--out", cache, "--cameras", CAMERA, *RANDOM).exit_code == 0
    before = dataset.read_bytes()
    (tmp_path / "link.hdf5").symlink_to(dataset)
    for out in (dataset, tmp_path / "link.hdf5"):
        assert "is an input of this command" in refused(run("cache", "export", cache, "--out", out, "--overwrite"))
        assert dataset.read_bytes() == before


def test_the_report_of_a_run_is_written_again_but_never_over_a_page_of_the_users(tmp_path, made):
    trained = tmp_path / "run"
    shutil.copytree(made[2], trained)
    assert run("report", trained).exit_code == 0
    assert run("report", trained).exit_code == 0
    page = trained / "report.html"
    page.write_text("<!doctype html><p>my own notes on this run")
    assert "--overwrite" in refused(run("report", trained))
    assert "my own notes" in page.read_text()
    assert run("report", trained, "--overwrite").exit_code == 0
    assert "my own notes" not in page.read_text()


def test_folders_devices_and_links_are_no_target(tmp_path, made):
    report = commands(made)["report"]
    assert "folder" in refused(run(*report, tmp_path, "--overwrite"))
    assert "not a regular file" in refused(run(*report, "/dev/null", "--overwrite"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(run(*report, tmp_path / "loop", "--overwrite"))
    (tmp_path / "page.html").symlink_to(tmp_path / "real.html")
    assert run(*report, tmp_path / "page.html").exit_code == 0
    assert (tmp_path / "page.html").is_symlink()
    assert (tmp_path / "real.html").is_file()


def test_a_full_disk_is_told_and_the_file_that_was_there_stays(tmp_path):
    target = tmp_path / "picture.png"
    target.write_bytes(b"\x89PNG\r\n\x1a\nold")

    def fill(error):
        with output_file(target, PNG, overwrite=True) as partial:
            partial.write_bytes(b"half")
            raise error

    for code, said in (
        (errno.ENOSPC, "no space left for"),
        (errno.EDQUOT, "disk quota exceeded for"),
        (errno.EFBIG, "file size limit exceeded for"),
    ):
        with pytest.raises(CachePipelineError, match=rf"{said} .*picture\.png, which was not written"):
            fill(OSError(code, os.strerror(code)))
    with pytest.raises(RuntimeError, match="defect"):
        fill(RuntimeError("defect"))
    with pytest.raises(ConfigError, match="refused"):
        fill(ConfigError("refused"))
    assert target.read_bytes().endswith(b"old")
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]


def test_what_a_killed_process_has_left_is_removed_before_the_free_space_is_measured(tmp_path, monkeypatch):
    target, left = tmp_path / "picture.png", tmp_path / ".picture.png.4194999.partial"
    left.write_bytes(b"half")
    os.utime(left, (1, 1))
    space = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: space._replace(free=0 if left.exists() else 10))
    with output_file(target, PNG, overwrite=False, needed=10) as partial:
        partial.write_bytes(b"\x89PNG\r\n\x1a\n")
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]

    def write():
        with output_file(target, PNG, overwrite=True, needed=11):
            raise AssertionError

    with pytest.raises(CachePipelineError, match="no space left"):
        write()


def test_bench_replaces_its_own_figures(tmp_path):
    from cache_pipeline.files import check_output
    from cache_pipeline.reports.bench.run import BENCH_JSON

    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"device": "a CPU", "rows": []}))
    assert check_output(file, BENCH_JSON, overwrite=True) == file
    file.write_text(json.dumps({"format": 1, "config": {}}))
    with pytest.raises(ConfigError, match="not a JSON file that bench wrote"):
        check_output(file, BENCH_JSON, overwrite=True)
