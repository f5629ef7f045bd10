"""Texts of messages: short lists, and lines that every terminal can show."""

import codecs
import doctest
import logging

import pytest
from typer.testing import CliRunner

from cache_pipeline import text
from cache_pipeline.cli import app
from cache_pipeline.cli.terminal import LineFormatter
from cache_pipeline.errors import available
from cache_pipeline.text import by_name, listed, message_line, plain, printable, shortened


def test_the_examples_of_the_module_hold():
    assert doctest.testmod(text).failed == 0


def test_a_list_of_names_stays_short():
    names = [f"cam{i}" for i in range(60)]
    assert listed(names, limit=3) == "cam0, cam1, cam2, … (57 more)"
    assert available(["x" * 5000]) == f"available: {shortened('x' * 5000)}"
    assert len(shortened("x" * 5000)) == 60


def test_sentences_about_many_names_take_few_lines():
    same = by_name(dict.fromkeys((f"cam{i}" for i in range(60)), "black"), "camera")
    assert len(same) == 1
    assert same[0].endswith("… (48 more): black")
    different = by_name({f"cam{i}": f"error {i}" for i in range(60)}, "camera", limit=3, more="--json lists all")
    assert different == ["cam0: error 0", "cam1: error 1", "cam2: error 2", "… and 57 more cameras (--json lists all)"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\nb", r"a\nb"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\x85b\u2028c\u202ed", r"a\x85b\u2028c\u202ed"),
        ("bad\udcff", r"bad\udcff"),
        ("démo 😀 → ×", "démo 😀 → ×"),
    ],
)
def test_names_cannot_control_the_terminal(name, shown):
    assert printable(name) == shown


def test_an_overlong_name_is_shortened_in_messages_and_a_path_is_not(tmp_path, monkeypatch):
    long, path = "n" * 300, tmp_path / ("f" * 200)
    line = message_line(f"{path}: no camera '{long}'; see {path}/data/{long}, {'w' * 61}")
    assert f"{path}: no camera '{shortened(long)}'; see" in line
    assert line.endswith(f"/data/{shortened(long)}, {shortened('w' * 61)}")
    monkeypatch.chdir(tmp_path)
    path.touch()
    assert message_line(f"{path.name}: damaged") == f"{path.name}: damaged"
    assert len(message_line("many words " * 10_000)) <= 4000


def test_signs_that_an_encoding_lacks_become_ascii():
    with pytest.raises(UnicodeEncodeError) as raised:
        "84×84 → é ±1 … 😀 \udcff".encode("ascii")
    said, end = plain(raised.value)
    assert (said, end) == ("x", 3)
    codecs.register_error("tests.plain", plain)
    assert "84×84 → é ±1 … 😀 \udcff".encode("ascii", "tests.plain") == rb"84x84 -> \xe9 +/-1 ... \U0001f600 \udcff"
    assert "é → \udcff".encode("utf-8", "tests.plain") == "é → \\udcff".encode()


def test_a_log_record_is_one_line():
    record = logging.LogRecord("x", logging.INFO, "", 0, "demo %s", ("a\nb\x1b[31m",), None)
    assert LineFormatter().format(record) == r"demo a\nb\x1b[31m"


def test_an_error_with_names_from_a_file_is_one_line_without_control_characters():
    result = CliRunner().invoke(app, ["inspect", "no\x1b[31m\nfile"])
    assert result.exit_code == 1
    assert "\x1b" not in result.stderr
    assert len(result.stderr.splitlines()) == 1
