"""What the system refuses ends in one line on stderr and exit 1, in every command."""

import errno
import os
import shutil

import pytest
from cache_fakes import CAMERA
from fakes import make_dataset
from typer.testing import CliRunner

from cache_pipeline.cli import app
from cache_pipeline.errors import described
from cache_pipeline.hdf5 import group_attributes

RANDOM = ["--no-pretrained-encoder", "--device", "cpu", "--precision", "fp32"]
TRAIN = ["--steps", 2, "--batch-size", 4, "--device", "cpu"]


def run(*args):
    return CliRunner().invoke(app, ["--quiet", *map(str, args)])


def the_error(result):
    assert result.exit_code == 1, (result.output, result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert result.stdout == ""
    return lines[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    dataset, cache, trained = make_dataset(folder / "data.hdf5"), folder / "data.zarr", folder / "run"
    assert run("extract-features", dataset, "--out", cache, "--cameras", CAMERA, *RANDOM).exit_code == 0
    assert run("train", "--from-cache", cache, "--out", trained, *TRAIN).exit_code == 0
    return dataset, cache, trained


def commands(made, folder):
    """Every command that writes, into ``folder``."""
    dataset, cache, trained = made
    shutil.copytree(cache, folder / "own.zarr", dirs_exist_ok=True)
    return {
        "extract-features": ["extract-features", dataset, "--out", folder / "x.zarr", *RANDOM],
        "cache export": ["cache", "export", cache, "--out", folder / "x.npz"],
        "cache compact": ["cache", "compact", folder / "own.zarr"],
        "train": ["train", "--from-cache", cache, "--out", folder / "run", *TRAIN],
        "report": ["report", trained, "--out", folder / "x.html"],
        "inspect": ["inspect", cache, "--views", folder / "x.png"],
        "probe": ["probe", cache, "--device", "cpu", "--out", folder / "x.png"],
    }


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize(
    "name", ["extract-features", "cache export", "cache compact", "train", "report", "inspect", "probe"]
)
def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path, made, monkeypatch, name, code):
    folder = tmp_path / "folder"
    folder.mkdir()
    command = commands(made, folder)[name]
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    real_open, real_mkdir = os.open, os.mkdir

    def refused(real, writes):
        def call(path, *args, **kwargs):
            if str(path).startswith(str(folder)) and writes(*args):
                raise OSError(code, os.strerror(code), str(path))
            return real(path, *args, **kwargs)

        return call

    # ``open`` of Python's own files passes ``os.open`` by; all that we write is first synced or locked with it.
    monkeypatch.setattr(os, "open", refused(real_open, lambda flags, *mode: flags & (os.O_WRONLY | os.O_RDWR)))
    monkeypatch.setattr(os, "mkdir", refused(real_mkdir, lambda *mode: True))
    error = the_error(run(*command))
    monkeypatch.undo()
    assert str(folder) in error
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_what_the_system_says_comes_with_place_and_advice():
    error = OSError(errno.EXDEV, "Invalid cross-device link", "/a", None, "/b")
    assert described(error) == "/a → /b: invalid cross-device link; check the path and its disk or network"
    for code in (errno.EMFILE, errno.ENFILE):
        assert described(OSError(code, os.strerror(code), "/a")).endswith(
            "raise the limit with ulimit -n and run the same command again"
        )
    assert described(PermissionError(13, "Permission denied", "/a")).endswith(
        "get permission for this path, or give another path"
    )
    assert described(OSError("no number")).startswith("no number; check")


def test_a_file_that_cannot_be_opened_for_lack_of_descriptors_is_not_called_damaged(made, monkeypatch):
    def no_more(*args, **options):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("cache_pipeline.hdf5.isolated", no_more)
    with pytest.raises(OSError, match="Too many open files"):
        group_attributes(made[0])


def test_the_folder_one_is_in_is_a_path_like_any_other(tmp_path, made, monkeypatch):
    _, cache, trained = made
    monkeypatch.chdir(cache)
    for command in (["inspect", "."], ["verify", ".", "--device", "cpu"], ["verify", ".", "--integrity"]):
        result = run(*command)
        assert result.exit_code == 0, result.output
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    monkeypatch.chdir(copy)
    for command in (["inspect", "."], ["report", "."]):
        result = run(*command)
        assert result.exit_code == 0, result.output
    assert f"Training run {tmp_path.name}/copy" in (copy / "report.html").read_text()
    result = run("finetune", "--checkpoint", ".", "--live-encoder", *TRAIN)
    assert (tmp_path / "copy_finetune/run.json").is_file(), result.output
    assert "is not a cache" in the_error(run("cache", "compact", "."))
    assert "other contents" in the_error(run("extract-features", made[0], "--out", ".", *RANDOM))
