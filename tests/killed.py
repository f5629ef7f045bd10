"""Extraction in a process that can be killed. A fork server imports torch once, so that starting one is quick."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from cache_fakes import extract

from cache_pipeline.encoders.frozen import FrozenEncoder

# Before Python 3.13 a fork server has not its parent's sys.path, and passes over what it cannot import.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["killed"])


def extract_slowly(out: Path, dataset: Path, seconds: float) -> None:
    """Extracts two views, ``seconds`` longer for each batch; Ctrl-C works wherever the tests were started."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    real = FrozenEncoder.__call__

    def slow(self, frames, view=None):
        time.sleep(seconds)
        return real(self, frames, view)

    FrozenEncoder.__call__ = slow
    extract(out, dataset, views=2)


def start(out: Path, dataset: Path, seconds: float = 0.01) -> BaseProcess:
    """A process that extracts."""
    process = CONTEXT.Process(target=extract_slowly, args=(out, dataset, seconds))
    process.start()
    return process


def wait_for(process: BaseProcess, folder: Path, pattern: str) -> None:
    """Waits until a file of the pattern is there, while the process lives."""
    while not list(folder.glob(pattern)):
        assert process.is_alive(), "the process ended too early"
        time.sleep(0.005)
