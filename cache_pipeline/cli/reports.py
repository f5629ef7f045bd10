"""The commands quickstart, report, probe and bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cache_pipeline.cli import options as o
from cache_pipeline.cli.terminal import when_interrupted
from cache_pipeline.errors import ConfigError
from cache_pipeline.options import MOST_STEPS


def quickstart(
    out: Annotated[Path, typer.Option("--out", help="Folder for the cache, the run and the report.")] = Path(
        "quickstart"
    ),
    dataset: Annotated[
        Path | None, typer.Option("--dataset", help="A robomimic HDF5 file; the sample by default.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=10, max=MOST_STEPS, help="Training steps.")] = 1500,
    weights: o.Weights = None,
    weights_prefix: o.WeightsPrefix = None,
    device: o.Device = "auto",
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """The whole path on the sample: inspect, extract, verify, train, evaluate, and an HTML report."""
    from cache_pipeline.reports.quickstart import run_quickstart

    with when_interrupted("features so far are kept; run the same command again to continue"):
        result = run_quickstart(
            out,
            dataset=dataset,
            steps=steps,
            weights=weights,
            weights_prefix=weights_prefix,
            device=device,
            seed=seed,
        )
    o.emit(json, result.to_json(), result.lines())


def report(
    runs: Annotated[list[Path], typer.Argument(help="A run, or several to compare.", metavar="RUN...")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The page; by default RUN/report.html, or comparison.html beside the first run."),
    ] = None,
    encoder: o.StoredEncoder = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Draw a run on one HTML page: curves, actions, features, frames and rollouts; or compare several runs."""
    if len(runs) > 1:
        from cache_pipeline.reports.comparison import write_comparison

        if encoder:
            raise ConfigError("--encoder is for the report of one run; a comparison loads no encoder, so leave it out")
        page = write_comparison(runs, out, overwrite=overwrite)
    else:
        from cache_pipeline.reports.run_report import write_report

        page = write_report(runs[0], out, overwrite=overwrite, encoder=encoder)
    o.emit(json, {"report": str(page)}, [f"report: {page}"])


def probe(
    cache: o.Cache,
    out: Annotated[Path | None, typer.Option("--out", help="A picture of the answer (.png).")] = None,
    overwrite: o.Overwrite = False,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    json: o.Json = False,
) -> None:
    """Say whether frozen features suffice, compared with proprioception alone and random weights (a heuristic)."""
    from cache_pipeline.reports.probe import probe_cache

    result = probe_cache(cache, picture=out, overwrite=overwrite, seed=seed, device=device)
    o.emit(json, result.to_json(), result.lines())


def bench(
    cases: Annotated[
        list[str] | None,
        typer.Argument(help="encode, extract, load, train, stream, finetune, frontier; default: all."),
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option("--dataset", help="A robomimic HDF5 file; the sample by default.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option("--store", help="Where the case stream has a cache, such as a URL; it is removed at the end."),
    ] = None,
    rgb_model_name: o.RgbModelName = "resnet18",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Windows per training step.")] = 64,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.1, max=3600, help="Least seconds per measurement.")
    ] = 10.0,
    out: Annotated[Path | None, typer.Option("--out", help="Write the results as JSON to this file.")] = None,
    overwrite: o.Overwrite = False,
    device: o.Device = "auto",
    json: o.Json = False,
) -> None:
    """Measure this package, other packages and hardware limits side by side in one run."""
    from cache_pipeline.reports.bench.run import run_bench

    result = run_bench(
        tuple(cases or ()),
        dataset=dataset,
        store=store,
        rgb_model_name=rgb_model_name,
        batch_size=batch_size,
        seconds=seconds,
        out=out,
        device=device,
        overwrite=overwrite,
    )
    o.emit(json, result.to_json(), result.lines())
