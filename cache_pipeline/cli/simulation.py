"""The commands collect and rollout, which need a simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cache_pipeline.cli import options as o
from cache_pipeline.cli.generated import Given, generated
from cache_pipeline.options import DATA
from cache_pipeline.sim.collect_config import CollectConfig, RerenderConfig
from cache_pipeline.sim.config import RolloutConfig


@generated(CollectConfig, RerenderConfig)
def collect(
    given: Given,
    from_states: Annotated[
        Path | None,
        typer.Option(
            "--from-states",
            help="Render the recorded states of this robomimic file instead.",
            metavar="FILE",
            rich_help_panel=DATA,
        ),
    ] = None,
    json: o.Json = False,
) -> None:
    """Write scripted robosuite demos in robomimic's layout, or a dataset's states as images (--from-states)."""
    result: Any
    if from_states is None:
        from cache_pipeline.sim.collect import collect as run

        result = run(given.config(CollectConfig))
    else:
        from cache_pipeline.sim.rerender import rerender

        result = rerender(given.config(RerenderConfig, source=from_states))
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
