"""The run folder: whether it may be written, what run.json says, and what a resumed run must agree with."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_pipeline import __version__
from cache_pipeline.encoders.image_encoder import ImageEncoder
from cache_pipeline.encoders.saving import save_encoder
from cache_pipeline.errors import CheckpointError
from cache_pipeline.files import write_json
from cache_pipeline.training.checkpoint import CHECKPOINTS, FORMAT, RUN_JSON, read_run
from cache_pipeline.training.config import FinetuneConfig, TrainConfig
from cache_pipeline.training.metrics import CSV_NAME, TENSORBOARD

# Options that may differ when a run is resumed: they change what is kept or where it runs, not what is learned.
FREE_TO_CHANGE = {
    "resume",
    "overwrite",
    "out",
    "saving",
    "device",
    "cuda_graph",
    "max_memory",
    "source",
    "cache",
    "datasets",
    "wandb",
}


def check_run_folder(run: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises CheckpointError unless ``run`` may be written, or resumed, as asked. Changes nothing."""
    there = (run / RUN_JSON).is_file()
    if resume and not there:
        raise CheckpointError(f"{run} holds no run to resume; leave --resume out to start one")
    if there and not (resume or overwrite):
        raise CheckpointError(f"{run} holds a run; give --resume to go on, --overwrite to replace it, or another --out")
    if run.exists() and not there and (not run.is_dir() or any(run.iterdir())):
        raise CheckpointError(f"{run} exists and is not a run; give another --out")


def start_run(run: Path, value: Mapping[str, Any], encoders: Mapping[str, ImageEncoder]) -> None:
    """Makes the run folder, in place of an earlier run that is there.

    Args:
        value: what run.json says, besides versions and the command.
        encoders: file name → encoder.
    """
    for name in (RUN_JSON, CSV_NAME):
        (run / name).unlink(missing_ok=True)
    for name in (CHECKPOINTS, TENSORBOARD):
        shutil.rmtree(run / name, ignore_errors=True)
    try:
        run.mkdir(parents=True, exist_ok=True)
        for file, encoder in encoders.items():
            save_encoder(encoder, run / file)
        write_json(run / RUN_JSON, {"format": FORMAT, **value, "versions": _versions(), "command": sys.argv})
    except OSError as error:
        raise CheckpointError(f"cannot write the run folder {run} ({error})") from error


def check_resumed(run: Path, config: TrainConfig | FinetuneConfig, data: Mapping[str, Any]) -> dict[str, Any]:
    """run.json of a run to be resumed; raises CheckpointError naming the first thing that differs."""
    value = read_run(run)
    before = type(config).from_json(value["config"]).to_json()
    for name, now in config.to_json().items():
        if name not in FREE_TO_CHANGE and before[name] != now:
            raise CheckpointError(
                f"{run} was trained with {name} {before[name]!r} and is to be resumed with {now!r}; give the same, "
                f"or another --out"
            )
    if value["data"]["fingerprint"] != data["fingerprint"] and None not in (
        value["data"]["fingerprint"],
        data["fingerprint"],
    ):
        raise CheckpointError(f"{run} was trained on another state of the cache; give another --out to start anew")
    return value


def _versions() -> dict[str, str]:
    return {
        "cache_pipeline": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
