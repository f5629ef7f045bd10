"""Kills commands that write a file in parts."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from cache_pipeline.sim.collect_config import FileConfig


def killed_at(command: Callable[..., Any], config: FileConfig, parts: int) -> None:
    """Runs ``collect`` or ``rerender`` in another process, which is killed once it has finished some parts."""
    process = multiprocessing.get_context("fork").Process(target=command, args=(config,), kwargs={"progress": False})
    process.start()
    while len(list(config.out.parent.glob(".*.parts/part_*"))) < parts:
        assert process.is_alive()
        time.sleep(0.002)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not config.out.exists()
