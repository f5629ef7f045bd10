"""Every command that writes, on disks of ten sizes: `uv run pytest -m stress tests/stress/test_stress_disk.py`."""

import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest
from full_disk import check_refused, commands, contents, make

pytestmark = [pytest.mark.stress, pytest.mark.timeout(7200)]

SIZES = int(os.environ.get("STRESS_SIZES", "10"))
NAMES = [
    "extract-features",
    "cache compact",
    "cache export hdf5",
    "cache export npz",
    "train",
    "finetune",
    "report",
    "inspect",
    "probe",
    "bench",
    "collect",
    "rollout",
    "rollout --video",
    "quickstart",
    "export pt2",
    "export onnx",
]
FOLDERS = ["extract-features", "cache compact", "train", "finetune", "rollout", "quickstart"]
PAGE = 4096


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def disk(tmp_path):
    """A small disk."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512m", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def free(disk):
    state = os.statvfs(disk)
    return state.f_bavail * state.f_frsize


@contextmanager
def only(disk, most):
    """Fills the disk up to ``most`` free bytes."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(PAGE, free(disk) - most // PAGE * PAGE))
    try:
        yield
    finally:
        filler.unlink()


@pytest.mark.parametrize("name", NAMES)
def test_a_command_on_a_disk_of_any_size_is_one_line_and_works_once_there_is_space(disk, made, capfd, name):
    command, refused = commands(made)[name], 0
    out = command.begin(disk / command.output)
    before = free(disk)
    result = command.run(out, False)
    assert result.exit_code == 0, result.output
    needed = before - free(disk)
    if name == "cache compact":  # the old cache stays until the new one is whole
        needed = sum(-(-len(content) // PAGE) * PAGE for content in contents(out).values())
    for part in range(SIZES):
        remove(out)
        command.begin(out)
        kept = contents(out.parent) if name in ("cache compact", "rollout") else {}
        with only(disk, needed * part // SIZES):
            result = command.run(out, False)
        if result.exit_code == 0:
            assert part > SIZES // 2, "a command needs at least half of what it writes"
            continue
        refused += 1
        check_refused(result, out)
        assert kept.items() <= contents(out.parent).items()
        assert name in FOLDERS or not out.exists()
        again = command.run(out, False)
        assert again.exit_code == 0, again.output
        assert capfd.readouterr().err == ""
    print(f"{name}: {refused} of {SIZES} disks were too small for {needed} bytes")
    assert refused > 0


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FOLDERS])
def test_a_file_that_cannot_be_replaced_on_a_full_disk_stays(disk, made, name):
    command = commands(made)[name]
    out = disk / command.output
    assert command.run(out, False).exit_code == 0
    before = contents(disk)
    with only(disk, 0):
        result = command.run(out, True)
    check_refused(result, out)
    assert contents(disk) == before


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
