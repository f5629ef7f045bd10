"""Options that several commands share, and the printing of results."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from cache_pipeline.cli.terminal import write_result
from cache_pipeline.files import finite
from cache_pipeline.options import LARGEST, OUTPUT

_results: Any = None


@contextmanager
def results_alone_on_stdout() -> Iterator[None]:
    """Sends all output except that of ``emit`` to stderr, since libraries such as torch print to stdout."""
    global _results
    before, _results = _results, sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _results = before


def emit(as_json: bool, value: dict[str, Any], lines: list[str]) -> None:
    """Prints one JSON object, or the lines for a person, to stdout."""
    for line in [json.dumps(finite(value), allow_nan=False)] if as_json else lines:
        write_result(line, _results)


Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.", rich_help_panel=OUTPUT)
]
Cache = Annotated[str, typer.Argument(help="A cache: a folder, or a URL such as s3://bucket/lift.zarr.")]
Datasets = Annotated[
    list[Path] | None, typer.Option("--dataset", help="An HDF5 file or LeRobot folder; may be repeated.")
]
Cameras = Annotated[str | None, typer.Option("--cameras", help="Cameras, comma-separated; all by default.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda:0.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=LARGEST, help="Seed of everything that is random.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing output once the new one is complete.")]
RgbModelName = Annotated[str, typer.Option("--rgb-model-name", help="resnet18, resnet34 or resnet50.")]
Weights = Annotated[Path | None, typer.Option("--weights", help="Encoder weights from a .pth or .safetensors file.")]
WeightsPrefix = Annotated[
    str | None,
    typer.Option("--weights-prefix", help="Beginning of the names of one of several ResNets in the file of --weights."),
]
StoredEncoder = Annotated[
    str | None,
    typer.Option("--encoder", help="The factory that made the encoder, if any; it runs only if it is named here."),
]
