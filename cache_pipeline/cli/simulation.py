"""The commands collect and rollout, which need a simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cache_pipeline.cli import options as o
from cache_pipeline.options import names


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


def rollout(
    run: Annotated[Path, typer.Argument(help="A run or one of its checkpoints.")],
    episodes: Annotated[int, typer.Option("--episodes", min=1, help="Episodes, one seed each.")] = 20,
    horizon: Annotated[int | None, typer.Option("--horizon", min=1, help="Most steps of an episode.")] = None,
    action_steps: Annotated[
        int | None, typer.Option("--action-steps", min=1, help="Steps of each action chunk to execute.")
    ] = None,
    video: Annotated[Path | None, typer.Option("--video", help="Folder for videos.")] = None,
    videos: Annotated[int, typer.Option("--videos", min=1, help="Episodes to record, with --video.")] = 3,
    overwrite: o.Overwrite = False,
    env_args: Annotated[
        Path | None, typer.Option("--env-args", help="JSON of the environment, for datasets without one.")
    ] = None,
    encoder: o.StoredEncoder = None,
    device: o.Device = "auto",
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Run a policy in the environment that its dataset describes and count successes."""
    from cache_pipeline.sim.config import RolloutConfig
    from cache_pipeline.sim.rollout import rollout as roll

    config = RolloutConfig(
        run=run,
        episodes=episodes,
        horizon=horizon,
        action_steps=action_steps,
        video=video,
        videos=videos,
        overwrite=overwrite,
        env_args=env_args,
        encoder=encoder,
        device=device,
        seed=seed,
    )
    result = roll(config, progress=True)
    o.emit(json, result.to_json(), result.lines())
