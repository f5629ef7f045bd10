"""How much memory features may take."""

from __future__ import annotations

import os
from pathlib import Path

import torch

SHARE = 0.5
CGROUP = Path("/sys/fs/cgroup")


def memory_budget(device: torch.device, max_memory: int | None) -> int:
    """Bytes that features or frames may take on ``device``: what was asked for, else half of what is free."""
    if max_memory is not None:
        return max_memory
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * SHARE)
    return int(_free_host_memory() * SHARE)


def _free_host_memory() -> int:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - int(used)))
