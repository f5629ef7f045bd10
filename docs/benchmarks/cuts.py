"""Measures which cut of the encoder to cache: extraction, size, training speed and held-out error.

``uv run docs/benchmarks/cuts.py --dataset lift.hdf5`` caches the features of ``avgpool``, ``layer4`` and ``layer3``,
trains on each with average pooling and with spatial softmax above the cut, and prints the table of docs/benchmarks.md.
A policy on ``layer3`` computes the frozen ``layer4`` in every step, and then pools as one on ``layer4`` does. So its
error is the same, and only its speed is measured, once and in few steps.
"""

from __future__ import annotations

from typing import Any

from common import Table, arguments, command, encoder_options, markdown, settings, spread

CASES = (
    ("avgpool", None),
    ("layer4", "avg"),
    ("layer4", "spatial_softmax"),
    ("layer3", "avg"),
    ("layer3", "spatial_softmax"),
)
SPEED_STEPS = {"layer3": 100}
HEAD = ["cut", "pooling", "extraction, s", "cache, MB", "steps/s", "held-out error"]


def main() -> None:
    parser = arguments(__doc__, "cuts")
    parser.add_argument("--rgb-model-name", default="resnet18")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    table = Table(options.out, settings(options, "rgb_model_name", "steps", "seeds"))
    encoder = encoder_options(options.rgb_model_name, options.weights)
    rows = []
    for cut, pooling in CASES:
        cache = options.work / f"{cut}.zarr"

        def extract(cut: str = cut, cache: object = cache) -> dict[str, Any]:
            found = command("extract-features", options.dataset, "--out", cache, "--cut", cut, *encoder).result
            return {"seconds": found["seconds"], "megabytes": found["bytes"] / 1e6}

        made = table.cell(f"{cut}, extraction", extract)
        trained, steps = [], SPEED_STEPS.get(cut, options.steps)
        for seed in range(1 if cut in SPEED_STEPS else options.seeds):
            run = options.work / f"{cut}_{pooling}_{seed}"
            pool = [] if pooling is None else ["--pooling", pooling]
            words = ["train", "--from-cache", cache, "--out", run, "--steps", steps, "--seed", seed, *pool]

            def train(words: list[object] = words) -> dict[str, Any]:
                found = command(*words, "--overwrite").result
                return {"steps_per_s": found["steps_per_s"], "error": found["valid_action_mse"]}

            trained.append(table.cell(f"{cut}, {pooling}, seed {seed}", train))
        rates, errors = ([cell[name] for cell in trained] for name in ("steps_per_s", "error"))
        sizes = [f"{made['seconds']:.0f}", f"{made['megabytes']:.0f}"]
        error = f"that of layer4, {pooling}" if cut in SPEED_STEPS else spread(errors)
        rows.append([cut, pooling or "in the cache", *sizes, spread(rates), error])
    print(markdown(HEAD, rows))


if __name__ == "__main__":
    main()
