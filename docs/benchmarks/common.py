"""What these scripts share: tables that a stopped script continues, and commands with their peak memory."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple

from cache_pipeline.files import atomic_path
from cache_pipeline.reports.bench.run import describe_device
from cache_pipeline.reports.sample import sample_dataset

ROOT = Path(__file__).parents[2]
MEGABYTE = 1_000_000


LAUNCHER = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
open(sys.argv[1], "w").write(str(usage.ru_maxrss))
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""Starts a command and writes its peak memory to a file. The kernel counts the memory of the process that starts a
command as the command's own, so a small process must start it."""


class Command(NamedTuple):
    """What a command printed as JSON, and the peak memory of its largest process."""

    result: dict[str, Any]
    peak_mb: float


def command(*words: object) -> Command:
    """Runs ``cli.py`` in a process of its own; stops the script if it fails."""
    print("  $ cli.py", *words, flush=True)
    return measured(ROOT / "cli.py", *words, "--json")


def measured(script: Path, *words: object) -> Command:
    """Runs a Python script in a process of its own; stops this one if it fails."""
    with NamedTemporaryFile("r") as peak:
        line = [sys.executable, "-S", "-c", LAUNCHER, peak.name, sys.executable, str(script), *map(str, words)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{script.name} {' '.join(map(str, words))} failed: {done.stderr.strip().splitlines()[-1:]}")
        return Command(json.loads(done.stdout), int(peak.read()) * 1024 / MEGABYTE)


class Table:
    """Measured cells in a JSON file. Each is written as soon as it is measured; a script run again measures the rest.

    Args:
        out: the file.
        settings: what decides the cells. A file with other settings is left as it is, and the script stops.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self._out = out
        self._value: dict[str, Any] = {"machine": describe_device("cpu"), "settings": settings, "cells": {}}
        if out.exists():
            found = json.loads(out.read_text())
            if found["settings"] != json.loads(json.dumps(settings)):
                sys.exit(f"{out} was measured with other settings; give another --out, or remove it")
            self._value = found

    def cell(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns a cell, measured now unless the file has it."""
        cells: dict[str, dict[str, Any]] = self._value["cells"]
        if name not in cells:
            print(name, flush=True)
            cells[name] = measure()
            self._out.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(self._out) as partial:
                partial.write_text(json.dumps(self._value, indent=1) + "\n")
        return cells[name]


def arguments(text: str | None, name: str) -> argparse.ArgumentParser:
    """Returns a parser with the options that every script has."""
    parser = argparse.ArgumentParser(description=(text or "").split("\n")[0])
    parser.add_argument("--dataset", type=Path, default=sample_dataset(), help="HDF5 dataset; default: the sample")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / f"{name}.json", help="file of the cells")
    parser.add_argument("--work", type=Path, default=Path("runs") / f"bench_{name}", help="folder of caches and runs")
    parser.add_argument("--weights", default="random", help="random, imagenet or a file of weights")
    return parser


def settings(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Returns the named options, and the names of the files of dataset and weights, without their folders."""
    files = {"weights": Path(options.weights).name, "dataset": options.dataset.name}
    return {**{name: getattr(options, name) for name in names}, **files}


def encoder_options(model: str, weights: str) -> list[str]:
    """Returns the options of ``extract-features`` and ``train`` that choose the encoder."""
    chosen = ["--no-pretrained-encoder"] if weights == "random" else ["--weights", weights]
    return ["--rgb-model-name", model, *([] if weights == "imagenet" else chosen)]


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns a table for docs/benchmarks.md."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Returns the mean, and the smallest and largest value."""
    if len(values) == 1:
        return f"{values[0]:.{digits}g}"
    return f"{mean(values):.{digits}g} ({min(values):.{digits}g}–{max(values):.{digits}g})"
