"""The commands train, finetune and export."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache_pipeline.cli import options as o
from cache_pipeline.cli.encoder import EncoderOptions
from cache_pipeline.cli.generated import Given, generated
from cache_pipeline.cli.terminal import when_interrupted
from cache_pipeline.errors import CheckpointError, ConfigError, OptionError, RunStopped
from cache_pipeline.options import DATA, ENCODER, read_fields
from cache_pipeline.training.config import NESTED, FinetuneConfig, TrainConfig

if TYPE_CHECKING:
    from cache_pipeline.training.result import TrainResult

logger = logging.getLogger("cache_pipeline")

# Settings of a run.json that apply only to that run. A factory is code, which runs only if the command line names it.
OF_ONE_RUN = ("out", "resume", "overwrite", "encoder_factory")
# Settings of a live run that a cache replaces.
ENCODER_SETTINGS = ("encoder", "preprocess")
# A stop that saves names the command that continues; this is for one before the first step or in the middle of a step.
INTERRUPTED = (
    "steps since the last checkpoint are lost; run the same command again, with --resume if there is a checkpoint"
)
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="Settings from a run.json; typed options override them.", rich_help_panel=DATA),
]


@generated(TrainConfig, EncoderOptions)
def train(given: Given, config: ConfigFile = None, json: o.Json = False) -> None:
    """Train projection and policy on a cache (--from-cache), or with the encoder live (--dataset)."""
    from cache_pipeline.training.train import train as run

    options = given.config(EncoderOptions)
    saved = {} if config is None else _settings(config, given, options.encoder)
    others: dict[str, Any] = {}
    if given["from_cache"] is not None or saved.get("cache") is not None:
        others["encoder_factory"] = options.encoder
    elif given["dataset"] and saved.get("encoder") is None:
        spec = options.spec(given["seed"])
        others |= {"encoder": spec, "preprocess": options.preprocess(spec)}
    made = given.config(TrainConfig, **others) if config is None else given.over(TrainConfig, saved, **others)
    _emit(partial(run, made), json)


@generated(FinetuneConfig)
def finetune(
    given: Given,
    live_encoder: Annotated[
        bool,
        typer.Option(
            "--live-encoder", help="Encode at every step, so that the encoder can learn.", rich_help_panel=ENCODER
        ),
    ] = False,
    json: o.Json = False,
) -> None:
    """Continue from a run with the encoder unfrozen: live, or live only above the cut of a cache."""
    from cache_pipeline.training.finetune import finetune as run

    if not live_encoder and given["from_cache"] is None:
        raise ConfigError(
            "the source of features is missing; give --live-encoder, or --from-cache with a cache cut below --unfreeze"
        )
    _emit(partial(run, given.config(FinetuneConfig)), json)


def export(
    run: Annotated[Path, typer.Argument(help="A run or one of its checkpoints.")],
    out: Annotated[Path, typer.Option("--out", help="The file: .onnx, or .pt2 (torch.export).")],
    encoder: o.StoredEncoder = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Write the policy to one file that takes raw images and low-dim obs and returns the action chunk."""
    from cache_pipeline.runs.export import export_policy

    result = export_policy(run, out, overwrite=overwrite, encoder=encoder)
    o.emit(json, result.to_json(), result.lines())


def _emit(run: Callable[[], TrainResult], json: bool) -> None:
    """Runs and prints the result; under torchrun only the first process prints."""
    from cache_pipeline.training.update.distributed import launched

    with when_interrupted(INTERRUPTED):
        try:
            result = run()
        except RunStopped as stopped:
            raise KeyboardInterrupt(f"{stopped}; continue with: {resuming_command()}") from None
    if launched().first:
        o.emit(json, result.to_json(), result.lines())


def resuming_command() -> str:
    """Returns this command line with --resume."""
    program, *words = sys.argv
    named = ["-m", "cache_pipeline"] if Path(program).name == "__main__.py" else [program]
    if "LOCAL_WORLD_SIZE" in os.environ:
        nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
        start = ["torchrun", *(["--nnodes", nodes] if nodes != "1" else [])]
        start += ["--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], *named]
    elif program.endswith(".py"):
        start = ["python", *named]
    else:
        start = [Path(program).name]
    return shlex.join([*start, *(word for word in words if word not in ("--overwrite", "--resume")), "--resume"])


def _settings(file: Path, given: Given, factory: str | None) -> dict[str, Any]:
    """Reads the settings of a run.json, or of a file with such settings alone. Code that it names does not run.

    Args:
        factory: the factory of the encoder that the command line names, in place of that of the file.

    Raises:
        CheckpointError: the file is missing, damaged, or of a fine-tuning run.
        OptionError: it names an encoder, and the command line does too.
        EncoderError: a factory makes its encoder, and the command line names none.
    """
    from cache_pipeline.encoders.factory import choose_factory
    from cache_pipeline.runs.record import read_object

    value = read_object(file)
    settings = value.get("config", value)
    if value.get("kind", "train") != "train" or not isinstance(settings, dict):
        raise CheckpointError(f"{file} does not hold settings of train; give the run.json of a training run")
    saved = read_fields(TrainConfig, {name: item for name, item in settings.items() if name not in OF_ONE_RUN}, NESTED)
    if given["from_cache"] is not None and saved.get("encoder") is not None:
        logger.info("the encoder of %s does not apply: the cache has its own", file)
        saved = {name: item for name, item in saved.items() if name not in ENCODER_SETTINGS}
    elif (spec := saved.get("encoder")) is not None:
        if given.any_typed(EncoderOptions, but=() if spec.factory is None else ("encoder",)):
            raise OptionError(
                f"{file} names the encoder, so encoder options have no effect; leave them or --config out"
            )
        if spec.factory is not None:
            saved["encoder"] = replace(spec, factory=choose_factory(spec.factory, factory, file))
    if (saving := saved.get("saving")) is not None and saving.rollout_env is not None:
        logger.info("%s names the environment %s, which runs only if --rollout-env names it", file, saving.rollout_env)
        saved["saving"] = replace(saving, rollout_env=None)
    return saved
