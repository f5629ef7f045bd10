"""Measures success against training steps and wall-clock for four ways to train the same policy.

``uv run docs/benchmarks/success.py --dataset lift.hdf5 --weights resnet50.safetensors`` trains each with several seeds,
runs rollouts on the way (``--rollout-every``), and prints the table of docs/benchmarks.md: the success at the end, and
the first measured step with at least 80 %. Seconds are those of training, with the extraction of the cache where there
is one, and without the rollouts. ``--recipes`` chooses some of the ways; those that encode live take hours on a CPU.
"""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

from common import Table, arguments, command, encoder_options, markdown, settings, spread

from cache_pipeline.sim.results import wilson_interval

RECIPES = ("cached, frozen", "frozen, then fine-tuned", "unfrozen, pretrained start", "unfrozen, random start")
GOAL = 0.8
HEAD = ["training", "steps", "success at the end (95 % interval)", "steps to 80 %", "seconds to 80 %"]


def main() -> None:
    parser = arguments(__doc__, "success")
    parser.add_argument("--rgb-model-name", default="resnet50")
    parser.add_argument("--cut", default="avgpool", help="of the cache, as in extract-features")
    parser.add_argument("--pooling", help="of a cut below avgpool, as in train; live training pools the same")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--cached-steps", type=int, default=4000)
    parser.add_argument("--live-steps", type=int, default=2000)
    parser.add_argument("--rollouts", type=int, default=5, help="measurements on the way")
    parser.add_argument("--live-rollouts", type=int, default=5, help="the same for encoders that learn")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2, help="processes of the rollouts; the result is the same")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    names = ("rgb_model_name", "cut", "pooling", "cached_steps", "live_steps", "rollouts", "live_rollouts", "episodes")
    table = Table(options.out, settings(options, *names))
    cache = [
        "--out",
        options.work / "cache.zarr",
        "--cut",
        options.cut,
        *encoder_options(options.rgb_model_name, options.weights),
    ]

    def extract() -> dict[str, Any]:
        return {"seconds": command("extract-features", options.dataset, *cache).result["seconds"]}

    extraction_s = table.cell("extraction", extract)["seconds"]
    rows = []
    for recipe in options.recipes:
        cells = [
            table.cell(f"{recipe}, seed {seed}", partial(measure, recipe, seed, extraction_s, options))
            for seed in range(options.seeds)
        ]
        rows.append(row(recipe, cells, options.episodes))
    print(markdown(HEAD, rows))


def measure(recipe: str, seed: int, extraction_s: float, options: Any) -> dict[str, Any]:
    """Trains one policy and returns [step, training seconds, success] of each rollout."""
    cached = recipe == "cached, frozen"
    weights = "random" if recipe == "unfrozen, random start" else options.weights
    encoder = encoder_options(options.rgb_model_name, weights)
    run, cache = options.work / f"{RECIPES.index(recipe)}_{seed}", options.work / "cache.zarr"
    if cached:
        seconds, words = extraction_s, ["train", "--from-cache", cache]
    elif recipe == "frozen, then fine-tuned":
        seconds, words = 0.0, ["finetune", "--live-encoder", "--checkpoint", options.work / f"0_{seed}"]
    else:
        seconds, words = 0.0, ["train", "--dataset", options.dataset, *encoder, "--no-freeze-encoder"]
        if weights == "random":
            words += ["--encoder-lr", "1e-4"]  # robomimic's rate; the default suits pretrained weights
    if options.pooling and recipe != "frozen, then fine-tuned":
        words += ["--pooling", options.pooling]
    steps, count = (options.cached_steps, options.rollouts) if cached else (options.live_steps, options.live_rollouts)
    rollouts = ["--rollout-every", max(1, steps // count), "--rollout-episodes", options.episodes]
    rollouts += ["--rollout-workers", options.workers]
    found = command(*words, "--out", run, "--steps", steps, "--seed", seed, "--overwrite", *rollouts).result
    curve = [[step, seconds + step / found["steps_per_s"], success] for step, success in successes(run / "metrics.csv")]
    return {"curve": curve, "extraction_s": seconds, "steps": steps, "error": found["valid_action_mse"]}


def successes(metrics: Path) -> list[tuple[int, float]]:
    with metrics.open() as file:
        return [
            (int(line["step"]), float(line["rollout/success_rate"]))
            for line in csv.DictReader(file)
            if line.get("rollout/success_rate")
        ]


def row(recipe: str, cells: list[dict[str, Any]], episodes: int) -> list[object]:
    last = [cell["curve"][-1][2] for cell in cells]
    low, high = wilson_interval(round(sum(last) * episodes), len(cells) * episodes)
    reached = [next((point for point in cell["curve"] if point[2] >= GOAL), None) for cell in cells]
    there = [point for point in reached if point is not None]
    missing = "" if len(there) == len(cells) else f"; {len(cells) - len(there)} of {len(cells)} never"
    steps, seconds = (spread([point[at] for point in there], 4) + missing if there else "never" for at in (0, 1))
    end = f"{sum(last) / len(last):.0%} ({low:.0%}–{high:.0%})"
    return [recipe, cells[0]["steps"], end, steps, seconds]


if __name__ == "__main__":
    main()
