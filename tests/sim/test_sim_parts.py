"""Finished parts of a file: kept, used again with the same settings only, and removed with the finished file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache_pipeline.cache.lock import writer_lock
from cache_pipeline.errors import ConfigError
from cache_pipeline.files import FileKind
from cache_pipeline.sim.parts import MARKER, PartedFileError, Parts, parted_file

TEXT = FileKind("a text", lambda path: True)


def make(out: Path, seed: int, numbers: range, stop: BaseException | None = None) -> dict[int, str]:
    """Makes parts, then the file; returns the parts that were there at first."""
    with parted_file(out, TEXT, {"seed": seed}, "part", overwrite=True) as parts:
        before = parts.finished()
        for number in numbers:
            parts.path(number, "json").write_text("{}")
        if stop is not None:
            raise stop
        parts.file.write_text("done")
    return before


def test_an_interrupted_command_goes_on_with_its_parts_and_leaves_the_file_alone(tmp_path: Path) -> None:
    out = tmp_path / "new" / "x.hdf5"
    assert make(out, 0, range(1)) == {}
    assert [path.name for path in out.parent.iterdir()] == ["x.hdf5"]
    with pytest.raises(KeyboardInterrupt, match="2 finished parts are kept; run the same command again to continue"):
        make(out, 0, range(2), KeyboardInterrupt())
    assert make(out, 0, range(2, 3)) == {0: "json", 1: "json"}
    assert [path.name for path in out.parent.iterdir()] == ["x.hdf5"]


def test_nothing_is_kept_where_nothing_was_finished(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="early"):
        make(tmp_path / "x.hdf5", 0, range(0), RuntimeError("early"))
    assert list(tmp_path.iterdir()) == []


def test_parts_of_other_settings_are_named_and_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "x.hdf5"
    with pytest.raises(RuntimeError):
        make(out, 0, range(2), RuntimeError())
    assert make(out, 1, range(1)) == {}
    assert len(caplog.records) == 1
    assert "holds 2 finished parts of an interrupted command with other settings (seed is 0 there and 1 here)" in (
        caplog.records[0].getMessage()
    )
    assert make(out, 0, range(0)) == {0: "json", 1: "json"}


def test_files_of_the_users_in_the_folder_of_parts_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "x.hdf5"
    with parted_file(out, TEXT, {}, "part", overwrite=False) as parts:
        parts.path(0).write_text("")
        note = parts.folder / "notes.txt"
        note.write_text("mine")
        parts.file.write_text("done")
    assert [path.name for path in note.parent.iterdir()] == ["notes.txt"]
    assert "cannot remove" in caplog.text
    note.parent.joinpath(MARKER).write_text("{}")
    with pytest.raises(ConfigError, match=r"exists and was not made by this command"):
        make_named(out, lambda parts: None)
    assert note.read_text() == "mine"


def make_named(out: Path, then: Callable[[Parts], Any]) -> None:
    with parted_file(out, TEXT, {}, "part", overwrite=True) as parts:
        then(parts)


def test_one_process_at_a_time_writes_a_file(tmp_path: Path) -> None:
    out = tmp_path / "x.hdf5"
    with writer_lock(out), pytest.raises(PartedFileError, match=r"x\.hdf5 is being written by process"):
        make(out, 0, range(1))
    assert list(tmp_path.iterdir()) == []
