"""Every command that writes ends in one line if it cannot, keeps what was there, and works once it can.

A limit on the size of files stands in for a full disk, since it needs no rights. The stress suite uses small disks.
"""

import pytest
from full_disk import check_refused, commands, contents, file_size_limit, make

FOLDERS = ["extract-features", "cache compact", "train", "finetune", "rollout"]
FILES = ["cache export hdf5", "cache export npz", "inspect", "probe", "bench", "collect", "rollout --video"]
SLOW_FILES = ["report", "export pt2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("name", [*FOLDERS, *FILES])
def test_a_command_that_cannot_write_is_one_line_and_works_once_it_can(tmp_path, made, capfd, name):
    command = commands(made)[name]
    first, out = (command.begin(tmp_path / folder / command.output) for folder in ("first", "then"))
    assert command.run(first, False).exit_code == 0
    for most in (1, command.needed(first) * 9 // 10):
        with file_size_limit(most):
            result = command.run(out, False)
        check_refused(result, out)
        assert name in FOLDERS or not out.exists()
    result = command.run(out, False)
    assert result.exit_code == 0, result.output
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", [*FILES, *SLOW_FILES])
def test_a_file_that_cannot_be_replaced_stays(tmp_path, made, capfd, name):
    command = commands(made)[name]
    out = tmp_path / command.output
    assert command.run(out, False).exit_code == 0
    before = contents(tmp_path)
    with file_size_limit(command.needed(out) * 9 // 10):
        result = command.run(out, True)
    check_refused(result, out)
    after = contents(tmp_path)
    kept = {file for file in after if file.parent.name.endswith(".parts")}  # with these the same command goes on
    assert {file: content for file, content in after.items() if file not in kept} == before
    assert (name == "collect") == bool(kept)
    assert command.run(out, True).exit_code == 0
    assert contents(tmp_path).keys() == before.keys()
    assert capfd.readouterr().err == ""
