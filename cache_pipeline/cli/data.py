"""extract-features, inspect, verify and the ``cache`` group: from a robomimic file to a cache that can be trusted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache_pipeline.cli import options as o
from cache_pipeline.cli.effects import CheckedCommand
from cache_pipeline.cli.encoder import EncoderOptions
from cache_pipeline.cli.generated import Given, generated
from cache_pipeline.cli.terminal import when_interrupted
from cache_pipeline.errors import CheckFailedError, ConfigError
from cache_pipeline.extract.config import ExtractConfig
from cache_pipeline.files import location
from cache_pipeline.options import DATA, ENCODER, LARGEST, OUTPUT, RUNNING
from cache_pipeline.text import listed

if TYPE_CHECKING:
    from cache_pipeline.reports.inspection import Inspection

cache_app = typer.Typer(help="Inspect, compact or export a cache.", no_args_is_help=True)


@generated(EncoderOptions, ExtractConfig)
def extract_features(
    given: Given,
    datasets: Annotated[
        list[Path] | None, typer.Argument(help="HDF5 files or LeRobot folders.", metavar="DATASET…")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", help="The cache: a folder or a URL, by convention NAME.zarr.", rich_help_panel=OUTPUT),
    ] = None,
    dataset: Annotated[
        list[Path] | None,
        typer.Option("--dataset", help="As DATASET; may be repeated.", metavar="FILE", rich_help_panel=DATA),
    ] = None,
    encoder_from: Annotated[
        Path | None,
        typer.Option(
            "--encoder-from", help="The encoder of this run, such as a fine-tuned one.", rich_help_panel=ENCODER
        ),
    ] = None,
    camera_encoder: Annotated[
        list[str] | None,
        typer.Option(
            "--camera-encoder",
            metavar="CAMERA=MODEL",
            help="CAMERA=MODEL[@WEIGHTS]: another encoder for one camera; may be repeated.",
            rich_help_panel=ENCODER,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option("--seed", min=0, max=LARGEST, help="Seed of everything that is random.", rich_help_panel=RUNNING),
    ] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print images, bytes and time, and do nothing.", rich_help_panel=RUNNING)
    ] = False,
    json: o.Json = False,
) -> None:
    """Run the frozen encoder once over DATASET and keep its features in a cache; rerun to resume or to extend."""
    from cache_pipeline.demos.dataset import distinct_paths

    paths = (*(datasets or []), *(dataset or []))
    if not paths or out is None:
        missing = "a dataset" if not paths else "--out"
        raise ConfigError(f"{missing} is missing; type: extract-features DATASET.hdf5 --out NAME.zarr")
    options = given.config(EncoderOptions)
    if encoder_from is not None:
        from cache_pipeline.runs.tuned_encoder import encoders_of_run

        chosen: Any = encoders_of_run(encoder_from, options.cut, encoder=options.encoder)
    else:
        chosen = options.for_cameras(camera_encoder, seed)
    distinct_paths(paths)
    config = given.config(ExtractConfig, datasets=paths, out=location(out), encoders=chosen[0], preprocess=chosen[1])
    config = replace(config, view_spec=replace(config.view_spec, seed=seed))
    from cache_pipeline.extract.pipeline import extract_features as run
    from cache_pipeline.extract.plan import plan_extraction

    with when_interrupted("finished units are kept; run the same command again to continue"):
        result = plan_extraction(config) if dry_run else run(config)
    o.emit(json, result.to_json(), result.lines())


def inspect(
    path: Annotated[
        str, typer.Argument(help="A dataset (HDF5 file or LeRobot folder), a cache (folder or URL) or a run.")
    ],
    views: Annotated[
        Path | None, typer.Option("--views", help="Draw frames of a cache in all its views to this PNG.")
    ] = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Say what a dataset, a cache or a run holds, and whether it is sound; exit 3 when it is not."""
    from cache_pipeline.reports.inspection import inspect_path

    if views is not None:
        from cache_pipeline.reports.view_sheet import write_view_sheet

        sheet = write_view_sheet(location(path), views, overwrite=overwrite)
        o.emit(json, {"picture": str(sheet)}, [f"picture: {sheet}"])
        return
    _tell(path, inspect_path(location(path)), json)


def _tell(path: str, found: Inspection, json: bool) -> None:
    """Prints the summary; exits with 3 if it has problems."""
    o.emit(json, found.to_json(), found.lines())
    if found.problems:
        more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
        raise CheckFailedError(f"{path} is not sound: {found.problems[0]}{more}")


def verify(
    cache: o.Cache,
    dataset: o.Datasets = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Random rows to encode again, per camera.")] = 64,
    integrity: Annotated[
        bool, typer.Option("--integrity", help="Read every unit and check its digest instead.")
    ] = False,
    device: o.Device = "auto",
    seed: o.Seed = 0,
    encoder: o.StoredEncoder = None,
    json: o.Json = False,
) -> None:
    """Encode random rows live and compare them with the cache, or check every stored byte; exit 3 when they differ."""
    if integrity:
        from cache_pipeline.cache.integrity import check_integrity

        checked = check_integrity(cache)
        o.emit(json, checked.to_json(), checked.lines())
        if not checked.ok:
            raise CheckFailedError(
                f"{cache}: {len(checked.broken)} of {checked.units} units are damaged: "
                f"{listed(checked.broken, limit=5)}; "
                "run the extract-features command again to write only these again"
            )
        return
    from cache_pipeline.extract.verify import verify

    result = verify(
        cache, datasets=tuple(dataset) if dataset else None, rows=rows, seed=seed, device=device, encoder=encoder
    )
    o.emit(json, result.to_json(), result.lines())
    if not result.ok:
        raise CheckFailedError(
            f"{cache}: stored features differ from live ones by {result.max_rel:.2e} relative, "
            f"more than the tolerance {result.tolerance:.0e}; "
            "run verify --integrity, then extract again with --overwrite"
        )


@cache_app.command("inspect", cls=CheckedCommand)
def cache_inspect(path: o.Cache, json: o.Json = False) -> None:
    """Say what a cache holds, what made it and whether it is complete; exit 3 when it is not."""
    from cache_pipeline.cache.summary import inspect_cache
    from cache_pipeline.reports.inspection import Inspection

    summary = inspect_cache(path)
    _tell(path, Inspection(summary, summary.problems), json)


@cache_app.command("compact", cls=CheckedCommand)
def cache_compact(path: o.Cache, json: o.Json = False) -> None:
    """Free the space of rows whose demos were removed or changed."""
    from cache_pipeline.cache.compact import compact

    result = compact(path)
    o.emit(json, result.to_json(), result.lines())


@cache_app.command("export", cls=CheckedCommand)
def cache_export(
    path: o.Cache,
    out: Annotated[Path, typer.Option("--out", help="A .hdf5 file in robomimic's layout, or an .npz file.")],
    overwrite: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Write the features as low-dim obs of a robomimic HDF5 that any robomimic script trains on, or as an .npz file."""
    from cache_pipeline.cache.export import export_npz, export_robomimic

    if out.suffix not in (".hdf5", ".h5", ".npz"):
        raise ConfigError(f"{out}: the suffix is not an export format; give .hdf5 (robomimic) or .npz")
    write = export_npz if out.suffix == ".npz" else export_robomimic
    result = write(path, out, overwrite=overwrite)
    o.emit(json, result.to_json(), result.lines())
