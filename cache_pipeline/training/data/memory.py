"""Memory budget of features or frames: it covers the peak while loading and the use afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

HALF = 0.5
CGROUP, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Data are loaded through a buffer of this fraction of their size, within these bounds in bytes.
PIECES = 32
LEAST_PIECE, LARGEST_PIECE = 1 << 20, 32 << 20


def memory_budget(device: torch.device, max_memory: int | None) -> int:
    """Returns the bytes that features or frames may take on ``device``: the option, else half of the free memory."""
    if max_memory is not None:
        return max_memory
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * HALF)
    return host_budget()


def host_budget() -> int:
    """Returns half of the free host memory in bytes, divided by the ``torchrun`` processes on this machine."""
    return int(_free_host_memory() * HALF) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def fits(needed: int, budget: int) -> bool:
    """Whether ``needed`` bytes and the loading buffer fit ``budget``."""
    return needed + needed // PIECES <= budget


def piece_rows(rows: int, row_bytes: int) -> int:
    """Returns the number of rows to load at a time."""
    size = min(LARGEST_PIECE, max(LEAST_PIECE, rows * row_bytes // PIECES))
    return max(1, size // max(1, row_bytes))


def _free_host_memory() -> int:
    return max(0, min([_free_of_machine(), *_free_of_cgroups()]))


def _free_of_machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_of_cgroups() -> Iterator[int]:
    """Returns the free bytes under each memory limit of this process: its control group and the parent groups."""
    for folder in _cgroup_folders(CGROUP, ""):
        yield from _free_under(folder, "memory.max", "memory.current", "inactive_file")
    for folder in _cgroup_folders(CGROUP / "memory", "memory"):
        yield from _free_under(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """``root`` and the groups below it that hold this process; of version 2 for the controller ``""``, else of 1."""
    try:
        lines = [line.split(":", 2) for line in OWN_CGROUP.read_text().splitlines()]
    except OSError:
        lines = []
    folders = [root]
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controller in controllers.split(","):
            for part in Path(path).parts[1:]:
                folders.append(folders[-1] / part)
    return folders


def _free_under(folder: Path, limit: str, used: str, reclaimable: str) -> Iterator[int]:
    """Counts inactive file pages as free, since the system drops them when memory is needed."""
    try:
        free = int((folder / limit).read_text()) - int((folder / used).read_text())
    except (OSError, ValueError):  # no such group here, or "max": no limit
        return
    with suppress(OSError):
        for line in (folder / "memory.stat").read_text().splitlines():
            if line.startswith(f"{reclaimable} "):
                free += int(line.split()[1])
    yield free
