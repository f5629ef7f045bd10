"""The Typer application: exit codes, logging, and the list of commands in the order of a typical workflow."""

from __future__ import annotations

import errno
import logging
import os
import signal
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cache_pipeline import __version__
from cache_pipeline.cli import data, reports, simulation, training
from cache_pipeline.cli.effects import CheckedCommand
from cache_pipeline.cli.terminal import (
    DELETED_FOLDER,
    LineFormatter,
    StderrHandler,
    any_streams,
    folder_is_deleted,
    say,
)
from cache_pipeline.errors import CachePipelineError, CheckFailedError, OptionError, described

EXIT_ERROR, EXIT_USAGE, EXIT_CHECK_FAILED, EXIT_INTERRUPTED = 1, 2, 3, 130


class ErrorGroup(TyperGroup):
    """Turns errors of this package and of the operating system into one line on stderr and an exit code.

    Any other exception is a bug and keeps its traceback.
    """

    def main(self, *args: Any, **options: Any) -> Any:
        with any_streams():
            try:
                return super().main(*args, **options)
            except OSError as error:  # help could not be written
                error.filename = error.filename or "standard output"
                say("error", _described(error))
                raise SystemExit(EXIT_ERROR) from error

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CachePipelineError as error:
            say("error", str(error))
            raise typer.Exit(_exit_code(error)) from error
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # the reader closed the pipe; click exits silently
            say("error", _described(error))
            raise typer.Exit(EXIT_ERROR) from error
        except KeyboardInterrupt as interrupt:
            if os.environ.get("RANK", "0") == "0":  # under torchrun only the first process prints
                say("interrupted", str(interrupt) or "nothing was saved", whole=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None


def _described(error: OSError) -> str:
    return DELETED_FOLDER if error.errno == errno.ENOENT and folder_is_deleted() else described(error)


def _exit_code(error: CachePipelineError) -> int:
    if isinstance(error, OptionError):
        return EXIT_USAGE
    return EXIT_CHECK_FAILED if isinstance(error, CheckFailedError) else EXIT_ERROR


app = typer.Typer(
    name="cache-pipeline",
    help="Train robot policies on frozen image features, computed once and kept in a cache that can be trusted.",
    cls=ErrorGroup,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"cache-pipeline {__version__}")
        raise typer.Exit


@app.callback()
def configure(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and errors on stderr.")] = False,
) -> None:
    handler = StderrHandler()
    handler.setFormatter(LineFormatter())
    logger = logging.getLogger("cache_pipeline")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    # SIGTERM is handled like Ctrl-C: open files are closed, finished work is kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


app.command("quickstart", cls=CheckedCommand)(reports.quickstart)
app.command("extract-features", cls=CheckedCommand)(data.extract_features)
app.command("inspect", cls=CheckedCommand)(data.inspect)
app.command("verify", cls=CheckedCommand)(data.verify)
app.add_typer(data.cache_app, name="cache")
app.command("train", cls=CheckedCommand)(training.train)
app.command("finetune", cls=CheckedCommand)(training.finetune)
app.command("rollout", cls=CheckedCommand)(simulation.rollout)
app.command("collect", cls=CheckedCommand)(simulation.collect)
app.command("probe", cls=CheckedCommand)(reports.probe)
app.command("export", cls=CheckedCommand)(training.export)
app.command("bench", cls=CheckedCommand)(reports.bench)
app.command("report", cls=CheckedCommand)(reports.report)
