"""The commands collect and rollout, which need a simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cache_pipeline.cli import options as o
from cache_pipeline.cli.generated import Given, generated
from cache_pipeline.options import names
from cache_pipeline.sim.config import RolloutConfig


def collect(
    out: Annotated[Path, typer.Option("--out", help="The HDF5 file to write.")],
    task: Annotated[str, typer.Option("--task", help="robosuite task with a scripted policy: Lift.")] = "Lift",
    demos: Annotated[int, typer.Option("--demos", min=1, help="Successful demos to collect.")] = 100,
    image_size: Annotated[int, typer.Option("--image-size", min=8, help="Height and width in pixels.")] = 84,
    cameras: o.Cameras = None,
    seed: o.Seed = 0,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Write scripted robosuite demos in robomimic's layout."""
    from cache_pipeline.sim.collect import CollectConfig
    from cache_pipeline.sim.collect import collect as run

    chosen = names(cameras) if cameras is not None else None
    extra: dict[str, Any] = {} if chosen is None else {"cameras": chosen}
    config = CollectConfig(
        out=out, task=task, demos=demos, image_size=image_size, seed=seed, overwrite=overwrite, **extra
    )
    result = run(config, progress=True)
    o.emit(json, result.to_json(), result.lines())


@generated(RolloutConfig)
def rollout(
    given: Given,
    run: Annotated[Path, typer.Argument(help="A run or one of its checkpoints.")],
    json: o.Json = False,
) -> None:
    """Run a policy in the environment of its dataset, or one of your own (--env), and count successes."""
    from cache_pipeline.sim.rollout import rollout as roll

    result = roll(given.config(RolloutConfig, run=run), progress=True)
    o.emit(json, result.to_json(), result.lines())
