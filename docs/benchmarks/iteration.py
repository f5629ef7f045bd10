"""Measures time per step, peak memory and trained parameters of a cached, a live frozen and an unfrozen encoder.

``uv run docs/benchmarks/iteration.py --dataset lift.hdf5`` measures each in processes of its own and prints the table
of docs/benchmarks.md. The step includes everything that a training step does; the first row of the metrics, which
contains the start, is left out by the command itself. All compute in fp32. A random start costs what an unfrozen
pretrained encoder costs, since only the values of the weights differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import Table, arguments, command, encoder_options, markdown, spread
from torch import nn

import cache_pipeline as cp

MODELS = ("resnet18", "resnet34", "resnet50")
KINDS = ("cached", "live, frozen", "live, unfrozen")
STEPS = {"cached": 400, "live, frozen": 12, "live, unfrozen": 6}
SHAPE = ["--obs-horizon", 2, "--action-horizon", 8, "--batch-size", 64, "--precision", "fp32"]


def main() -> None:
    options = arguments(__doc__, "iteration").parse_args()
    settings = {"steps": STEPS, "options": SHAPE, "dataset": options.dataset.name, "rounds": ROUNDS}
    table = Table(options.out, settings)
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for round_number in range(ROUNDS):
        for model in MODELS:
            cache = options.work / f"{model}.zarr"
            encoder = encoder_options(model, "random")
            command("extract-features", options.dataset, "--out", cache, "--precision", "fp32", *encoder)
            data = {
                "cached": ["--from-cache", cache],
                "live, frozen": ["--dataset", options.dataset, *encoder],
                "live, unfrozen": ["--dataset", options.dataset, *encoder, "--no-freeze-encoder"],
            }
            for kind in KINDS:
                run = options.work / f"{model}_{KINDS.index(kind)}_{round_number}"
                words = ["train", *data[kind], "--out", run, "--steps", STEPS[kind], "--overwrite", *SHAPE]
                cell = table.cell(
                    f"{model}, {kind}, round {round_number}", lambda words=words, run=run: measure(words, run)
                )
                cells.setdefault((model, kind), []).append(cell)
    print(markdown(HEAD, (row(cells, model, kind) for model in MODELS for kind in KINDS)))


ROUNDS = 2
HEAD = ["encoder", "training", "ms per step", "relative to cached", "peak memory, MB", "relative", "trained parameters"]


def measure(words: list[object], run: Path) -> dict[str, Any]:
    done = command(*words)
    policy = cp.load_policy(run)
    encoders = {id(value): value for value in policy.encoders.values()}
    encoder = sum(parameters(value) for value in encoders.values())
    other = sum(value.numel() for _, value in policy.policy_parameters())
    return {
        "ms_per_step": 1000 / done.result["steps_per_s"],
        "peak_mb": done.peak_mb,
        "trained": other + (encoder if "--no-freeze-encoder" in words else 0),
    }


def parameters(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def row(cells: dict[tuple[str, str], list[dict[str, Any]]], model: str, kind: str) -> list[object]:
    own, base = cells[model, kind], cells[model, "cached"]
    times, memory = [cell["ms_per_step"] for cell in own], [cell["peak_mb"] for cell in own]
    against = [cell["ms_per_step"] for cell in base]
    return [
        model,
        kind,
        spread(times),
        f"{sum(times) / sum(against):.3g}",
        spread(memory, 4),
        f"{sum(memory) / sum(cell['peak_mb'] for cell in base):.3g}",
        f"{own[0]['trained']:,}",
    ]


if __name__ == "__main__":
    main()
