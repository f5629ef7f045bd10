"""Options that several commands share, and the printing of results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cache_pipeline.options import OUTPUT


def emit(as_json: bool, value: dict[str, Any], lines: list[str]) -> None:
    """Prints one JSON object, or the lines for a person, to stdout."""
    if as_json:
        typer.echo(json.dumps(value, allow_nan=False))
    else:
        for line in lines:
            typer.echo(line)


Json = Annotated[
    bool, typer.Option("--json", help="One JSON object on stdout and nothing else there.", rich_help_panel=OUTPUT)
]
Datasets = Annotated[list[Path] | None, typer.Option("--dataset", help="A robomimic HDF5 file; may be repeated.")]
Cameras = Annotated[str | None, typer.Option("--cameras", help="Cameras, comma-separated; all by default.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda:0.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything that is random.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there once the new is complete.")]
RgbModelName = Annotated[str, typer.Option("--rgb-model-name", help="resnet18, resnet34 or resnet50.")]
Weights = Annotated[Path | None, typer.Option("--weights", help="Encoder weights from a .pth or .safetensors file.")]
StoredEncoder = Annotated[
    str | None,
    typer.Option("--encoder", help="The encoder's factory, for those made by one: it runs only if it is named here."),
]
