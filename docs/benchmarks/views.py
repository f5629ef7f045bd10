"""Measures what more views of each frame bring: the held-out error and the success of the policy.

``uv run docs/benchmarks/views.py --dataset lift.hdf5`` prints the table of docs/benchmarks.md. The first view is the
frame itself; the others change its colours (``extract-features --views K``), and with
``--extract-options "--crop-shape 76,76"`` also the place of the crop.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from common import Table, arguments, command, encoder_options, markdown, settings, spread

from cache_pipeline.sim.results import wilson_interval

VIEWS = (1, 2, 4, 8)
HEAD = ["views", "extraction, s", "cache, MB", "held-out error", "success (95 % interval)", "success of each seed"]


def main() -> None:
    parser = arguments(__doc__, "views")
    parser.add_argument("--rgb-model-name", default="resnet18")
    parser.add_argument("--views", type=int, nargs="+", default=VIEWS)
    parser.add_argument("--extract-options", default="", help="further options of extract-features, as one string")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2, help="processes of the rollouts; the result is the same")
    options = parser.parse_args()
    table = Table(options.out, settings(options, "rgb_model_name", "extract_options", "steps", "episodes"))
    rows = []
    for views in options.views:
        made = table.cell(f"views {views}", partial(extracted, views, options))
        cells = [
            table.cell(f"views {views}, seed {seed}", partial(trained, views, seed, options))
            for seed in range(options.seeds)
        ]
        rows.append(row(views, made, cells, options.episodes))
    print(markdown(HEAD, rows))


def extracted(views: int, options: Any) -> dict[str, Any]:
    encoder = encoder_options(options.rgb_model_name, options.weights)
    cache = options.work / f"{views}.zarr"
    words = ["--out", cache, "--views", views, *encoder, *options.extract_options.split()]
    found = command("extract-features", options.dataset, *words).result
    return {"seconds": found["seconds"], "megabytes": found["bytes"] / 1e6}


def trained(views: int, seed: int, options: Any) -> dict[str, Any]:
    """Trains one policy, and runs it from states that no demo has: the same for each number of views."""
    cache, run = options.work / f"{views}.zarr", options.work / f"{views}_{seed}"
    words = ["--steps", options.steps, "--seed", seed, "--out", run, "--overwrite"]
    found = command("train", "--from-cache", cache, *words).result
    words = ["--seed", 1, "--episodes", options.episodes, "--workers", options.workers]
    successes = command("rollout", run, *words).result["successes"]
    return {"error": found["valid_action_mse"], "steps_per_s": found["steps_per_s"], "successes": successes}


def row(views: int, made: dict[str, Any], cells: list[dict[str, Any]], episodes: int) -> list[object]:
    successes = [cell["successes"] for cell in cells]
    total = len(cells) * episodes
    low, high = wilson_interval(sum(successes), total)
    rate = f"{sum(successes)} of {total} ({low:.0%}–{high:.0%})"
    sizes = [f"{made['seconds']:.0f}", f"{made['megabytes']:.0f}"]
    return [views, *sizes, spread([cell["error"] for cell in cells]), rate, ", ".join(map(str, successes))]


if __name__ == "__main__":
    main()
