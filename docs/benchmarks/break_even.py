"""Measures after how many steps a cache has paid for its extraction.

``uv run docs/benchmarks/break_even.py --dataset lift.hdf5`` prints the table of docs/benchmarks.md. *Cold* is the
first training from files that are not in the page cache, *warm* the next one. The step at which the cache has paid is
the time of the whole extraction command over the time that a cached step saves against a live step with a frozen
encoder of equal precision.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from common import Table, arguments, command, encoder_options, markdown, settings

MODELS = ("resnet18", "resnet50")
SHAPE = ["--obs-horizon", 2, "--action-horizon", 8, "--batch-size", 64]
HEAD = [
    "encoder",
    "extraction, s",
    "start cold, s",
    "start warm, s",
    "ms per step, live",
    "cached",
    "has paid after, steps",
]


def main() -> None:
    options = arguments(__doc__, "break_even").parse_args()
    table = Table(options.out, settings(options))
    rows = []
    for model in MODELS:
        cell = table.cell(model, lambda model=model: paid(options.dataset, options.work, model))
        saved = (cell["live_ms"] - cell["cached_ms"]) / 1000
        times = [f"{cell[name]:.1f}" for name in ("extraction_s", "cold_s", "warm_s")]
        rows.append(
            [model, *times, f"{cell['live_ms']:.0f}", f"{cell['cached_ms']:.1f}", round(cell["extraction_s"] / saved)]
        )
    print(markdown(HEAD, rows))


def paid(dataset: Path, work: Path, model: str) -> dict[str, Any]:
    cache, encoder = work / f"{model}.zarr", encoder_options(model, "random")
    started = time.perf_counter()
    command("extract-features", dataset, "--out", cache, *encoder)
    extraction = time.perf_counter() - started
    seconds = []
    drop_from_page_cache(cache)
    for number in range(2):
        started = time.perf_counter()
        words = ["--steps", 1, "--out", work / f"{model}_start_{number}", "--overwrite", *SHAPE]
        command("train", "--from-cache", cache, *words)
        seconds.append(time.perf_counter() - started)
    cached = command(
        "train", "--from-cache", cache, "--steps", 400, "--out", work / f"{model}_cached", "--overwrite", *SHAPE
    )
    live = command(
        "train", "--dataset", dataset, *encoder, "--steps", 12, "--out", work / f"{model}_live", "--overwrite", *SHAPE
    )
    return {
        "extraction_s": extraction,
        "cold_s": seconds[0],
        "warm_s": seconds[1],
        "cached_ms": 1000 / cached.result["steps_per_s"],
        "live_ms": 1000 / live.result["steps_per_s"],
    }


def drop_from_page_cache(folder: Path) -> None:
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


if __name__ == "__main__":
    main()
