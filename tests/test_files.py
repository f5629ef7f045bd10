import errno
import json
import os

import pytest

from cache_pipeline.errors import StaleCacheError, available
from cache_pipeline.files import atomic_path, digest, json_digest, read_json, remove_partial, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})

    def fail_half_way():
        with atomic_path(path) as partial:
            partial.write_text("half a fi")
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        fail_half_way()
    assert read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["value.json"]


def test_only_old_partial_files_of_dead_processes_are_removed(tmp_path):
    path, dead = tmp_path / "value.json", 4_194_999  # above the largest process id of Linux
    names = {
        "dead": f".value.json.{dead}.partial",
        "young": f".value.json.{dead + 1}.partial",
        "alive": f".value.json.{os.getppid()}.partial",
        "of another file": f".other.json.{dead}.partial",
        "not ours": ".value.json.notes.partial",
    }
    for what, name in names.items():
        (tmp_path / name).write_text("half")
        if what != "young":
            os.utime(tmp_path / name, (1, 1))
    remove_partial(path)
    assert sorted(os.listdir(tmp_path)) == sorted({*names.values()} - {names["dead"]})


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    def fill():
        with atomic_path(tmp_path / "value.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"value\.json"):
        fill()


def test_nan_is_not_written_as_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "value.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_what_is_written_is_read_back(tmp_path):
    value = {"text": "84×84", "list": [1, 2.5, None], "nested": {"b": True}}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == value
    assert json.loads((tmp_path / "value.json").read_text()) == value


def test_a_digest_is_that_of_the_concatenation_and_sees_every_byte():
    assert digest(b"ab", b"c") == digest(b"abc") != digest(b"abd")
    assert len(digest(b"")) == 32


def test_a_json_digest_does_not_depend_on_the_order_of_keys():
    assert json_digest({"a": 1, "b": 2}) == json_digest({"b": 2, "a": 1}) != json_digest({"a": 2, "b": 1})


def test_available_names_the_nearest():
    assert available(["train", "valid"], "trian") == "available: train, valid (did you mean train?)"
    assert available([]) == "available: none"
    assert "(3 more)" in available([str(i) for i in range(15)])


def test_a_stale_cache_says_field_values_meaning_and_command():
    error = StaleCacheError(
        "precision.compute", "bf16", "fp32", "features differ in their last digits", "use --overwrite"
    )
    text = str(error)
    assert all(part in text for part in ("precision.compute", "'bf16'", "'fp32'", "last digits", "--overwrite"))
    assert (error.field, error.cached, error.wanted) == ("precision.compute", "bf16", "fp32")
