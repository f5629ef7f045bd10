"""What run.json says, and what a resumed run must agree with."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_pipeline import __version__
from cache_pipeline.encoders.image_encoder import ImageEncoder
from cache_pipeline.errors import CheckpointError
from cache_pipeline.runs.checkpoint import FORMAT, read_run
from cache_pipeline.runs.folder import RunFolder
from cache_pipeline.training.config import FinetuneConfig, TrainConfig

# Options that may differ when a run is resumed: they change what is kept or where it runs, not what is learned.
FREE_TO_CHANGE = {
    "resume",
    "overwrite",
    "out",
    "saving",
    "device",
    "encoder_factory",
    "deep",
    "max_memory",
    "source",
    "cache",
    "datasets",
    "wandb",
}


def start_run(folder: RunFolder, value: Mapping[str, Any], encoders: Mapping[str, ImageEncoder]) -> None:
    """Writes what a run begins with.

    Args:
        value: what run.json says, besides versions and the command.
        encoders: file name → encoder.
    """
    folder.start({"format": FORMAT, **value, "versions": _versions(), "command": sys.argv}, encoders)


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
