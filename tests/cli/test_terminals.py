"""Commands in every terminal: encodings, closed and full streams, a deleted folder, sixty cameras, interrupts."""

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
from cache_fakes import CAMERA
from fakes import make_dataset
from typer.testing import CliRunner

from cache_pipeline.cli import app
from cache_pipeline.cli.terminal import LineFormatter, StderrHandler

CLI = [sys.executable, str(Path(__file__).parents[2] / "cli.py")]
TINY = f"{Path(__file__).with_name('tiny_encoder.py')}:make"
NAMES = ("démo_é", "😀", "a\nb\x1b[31m", "demo_3")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "dé→.hdf5", names=NAMES, lengths=(4, 5, 6, 4), masks={})


def shell(command, *, env=None, cwd=None):
    """Runs a command in a shell, with ``CLI`` for the program."""
    line = command.replace("CLI", " ".join(CLI))
    return subprocess.run(["bash", "-c", line], capture_output=True, cwd=cwd, env={**os.environ, **(env or {})})


def the_line(result, code=1):
    assert result.returncode == code, result
    lines = result.stderr.decode(errors="replace").splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_encoding_without_our_signs_gets_ascii(dataset, encoding):
    result = shell(f"CLI inspect '{dataset}'", env={"PYTHONIOENCODING": encoding})
    assert result.returncode == 0, result.stderr
    assert b"24x24" in result.stdout or "24×24".encode("latin-1") in result.stdout
    assert rb"\U0001f600" in result.stdout
    assert rb"a\nb\x1b[31m" in result.stdout
    assert result.stderr == b""
    missing = shell("CLI inspect '→é.hdf5'", env={"PYTHONIOENCODING": encoding})
    assert "there is no file ->" in the_line(missing)
    assert shell("CLI train --help", env={"PYTHONIOENCODING": encoding}).returncode == 0


def test_a_file_name_that_is_not_utf8_is_read_and_never_written(tmp_path):
    make_dataset(tmp_path / "a.hdf5", cameras={CAMERA: (16, 16, 3)}).rename(
        os.fsdecode(bytes(tmp_path) + b"/b\xff.hdf5")
    )
    result = shell("CLI inspect b*.hdf5", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert rb"b\udcff.hdf5" in result.stdout
    refused = shell(r"CLI extract-features b*.hdf5 --out $'b\xff.zarr'", cwd=tmp_path)
    assert r"--out b\udcff.zarr is not valid UTF-8" in the_line(refused, code=2)
    extract = f"CLI -q extract-features b*.hdf5 --out c.zarr --encoder {TINY} --device cpu"
    for command in (extract, "CLI inspect c.zarr --json", "CLI inspect c.zarr --views c.png"):
        result = shell(command, cwd=tmp_path)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("redirected", "code"), [("| head -1", 0), (">&-", 0), ("2>&-", 0), ("<&- >&- 2>&-", 0), ("| true", 0)]
)
def test_closed_streams_are_no_error(dataset, redirected, code):
    result = shell(f"CLI inspect '{dataset}' {redirected}")
    assert result.returncode == code
    assert result.stderr == b""
    assert shell(f"CLI --help {redirected}").stderr == b""


def test_a_closed_stream_is_not_taken_for_a_file_of_the_command(dataset, tmp_path):
    """A file would get descriptor 2, and what libraries write to stderr would go into it."""
    before = dataset.read_bytes()
    result = shell(f"CLI inspect '{dataset}' --json 2>&- >{tmp_path}/out.json")
    assert result.returncode == 0
    assert dataset.read_bytes() == before
    assert (tmp_path / "out.json").read_bytes().startswith(b'{"sound"')


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("command", ["inspect FILE", "inspect FILE --json", "--help", "train --help", "--version"])
def test_a_full_standard_output_is_told_in_one_line(dataset, command):
    line = the_line(shell(f"CLI {command} >/dev/full".replace("FILE", f"'{dataset}'")))
    assert "no space left on device" in line
    quiet = shell(f"CLI {command} >/dev/full 2>/dev/full".replace("FILE", f"'{dataset}'"))
    assert quiet.returncode == 1


def test_a_deleted_working_directory_is_told_by_every_command(tmp_path, dataset):
    gone = tmp_path / "gone"
    commands = [f"inspect '{dataset}'", "inspect x", "train --from-cache x --out y", "cache compact x", "bench"]
    for command in commands:
        gone.mkdir()
        line = the_line(shell(f"rmdir '{gone}'; CLI {command}", cwd=gone))
        assert "the working directory has been deleted" in line
    gone.mkdir()
    assert shell(f"rmdir '{gone}'; CLI train --help", cwd=gone).returncode == 0


@pytest.mark.parametrize("columns", ["20", "0", "-5", "x"])
def test_any_width_of_the_terminal_is_taken(columns):
    assert shell("CLI train --help", env={"COLUMNS": columns}).returncode == 0


COMMANDS = {
    "cache_pipeline.extract.pipeline.extract_features": (
        ["extract-features", "f.hdf5", "--out", "x.zarr"],
        "finished units are kept; run the same command again to continue",
    ),
    "cache_pipeline.training.train.train": (
        ["train", "--from-cache", "x", "--out", "y"],
        "steps since the last checkpoint are lost; run the same command again, with --resume if there is a checkpoint",
    ),
    "cache_pipeline.sim.rollout.rollout": (["rollout", "x"], "nothing was saved"),
    "cache_pipeline.reports.probe.probe_cache": (["probe", "x"], "nothing was saved"),
    "cache_pipeline.reports.run_report.write_report": (["report", "x"], "nothing was saved"),
    "cache_pipeline.extract.verify.verify": (["verify", "x"], "nothing was saved"),
    "cache_pipeline.runs.export.export_policy": (["export", "x", "--out", "y"], "nothing was saved"),
    "cache_pipeline.reports.bench.run.run_bench": (["bench"], "nothing was saved"),
}


@pytest.mark.parametrize("function", COMMANDS)
def test_an_interrupted_command_says_what_is_kept(function, monkeypatch, tmp_path):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    make_dataset("f.hdf5")
    monkeypatch.setattr(function, interrupted)
    command, said = COMMANDS[function]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 130, result.output
    assert result.stderr == f"interrupted: {said}\n"


def test_log_lines_go_to_the_stderr_of_the_moment(monkeypatch, capsys):
    handler = StderrHandler()
    handler.setFormatter(LineFormatter())
    record = logging.makeLogRecord({"msg": "a line"})
    with io.StringIO() as replaced:
        monkeypatch.setattr(sys, "stderr", replaced)
        handler.emit(record)
        assert replaced.getvalue() == "a line\n"
    handler.emit(record)  # the stream is closed
    monkeypatch.undo()
    handler.emit(record)
    assert capsys.readouterr().err == "a line\n"


def test_sixty_cameras_take_few_lines(tmp_path):
    cameras = {f"cam{number:02d}_image": (8, 8, 3) for number in range(60)}
    dataset = make_dataset(tmp_path / "d.hdf5", cameras=cameras, action_dim=200)
    cache, run = tmp_path / "d.zarr", tmp_path / "run"
    common = ["--device", "cpu", "--encoder", TINY]
    commands = (
        ["extract-features", dataset, "--out", cache, *common],
        ["train", "--from-cache", cache, "--out", run, "--steps", 2, "--batch-size", 4, *common],
        ["inspect", dataset],
        ["inspect", cache],
        ["inspect", run],
        ["cache", "export", cache, "--out", tmp_path / "d.npz"],
        ["verify", cache, *common],
    )
    for command in commands:
        result = CliRunner().invoke(app, list(map(str, command)))
        assert result.exit_code == 0, result.output
        lines = result.output.splitlines()
        assert len(lines) < 25, result.output
        assert max(map(len, lines)) < 700, max(lines, key=len)
    for path in (dataset, cache, run):
        assert "cam59_image" in CliRunner().invoke(app, ["inspect", str(path), "--json"]).stdout


def test_sixty_black_cameras_take_few_warnings(tmp_path):
    cameras = {f"cam{number:02d}_image": (8, 8, 3) for number in range(60)}
    dataset = make_dataset(tmp_path / "d.hdf5", cameras=cameras)
    with h5py.File(dataset, "r+") as file:
        for demo in file["data"].values():
            for camera in cameras:
                demo[f"obs/{camera}"][...] = 0
    command = ["extract-features", dataset, "--out", tmp_path / "d.zarr", "--device", "cpu", "--encoder", TINY]
    result = CliRunner().invoke(app, ["-q", *map(str, command)])
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    assert len(lines) < 15, result.stderr
    assert any("(48 more): features of different frames differ" in line for line in lines)
    assert any("and 52 more cameras" in line for line in lines)
