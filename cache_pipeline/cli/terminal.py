"""Output on stdout and stderr that holds in every terminal: any encoding, closed or full streams, a deleted folder."""

from __future__ import annotations

import codecs
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer

from cache_pipeline.text import message_line, plain, printable

STANDARD = (0, 1, 2)
DELETED_FOLDER = "the working directory has been deleted; change to a folder that exists and type the command again"


class LineFormatter(logging.Formatter):
    """Formats each record as one line."""

    def format(self, record: logging.LogRecord) -> str:
        return message_line(record.getMessage())


class StderrHandler(logging.Handler):
    """Writes records to the stderr of the moment, which a program that calls a command may have replaced since."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ValueError):  # closed or full
            print(self.format(record), file=sys.stderr, flush=True)


@contextmanager
def any_streams() -> Iterator[None]:
    """Makes stdout and stderr take every text within a ``with`` block; discards what they cannot write at its end."""
    _open_closed_streams()
    codecs.register_error("cache_pipeline", plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="cache_pipeline")
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            _flush_or_discard(stream)


def _open_closed_streams() -> None:
    """Opens the null device as each closed standard stream: the next file would otherwise get its descriptor."""
    for descriptor in STANDARD:
        try:
            os.fstat(descriptor)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def _flush_or_discard(stream: Any) -> None:
    """Flushes a stream; if it fails, sends the rest to the null device, so that Python's own flush at exit is quiet."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


def write_result(line: str, stream: Any) -> None:
    """Prints a line of a result; raises OSError that names the output if it cannot be written."""
    try:
        typer.echo(printable(line), file=stream)
    except OSError as error:
        if error.filename is None:
            error.filename = "standard output"
        raise


def say(kind: str, text: str, *, whole: bool = False) -> None:
    """Prints ``kind: text`` as one line on stderr, if stderr takes it.

    Args:
        whole: leave long names as they are, for a command that the user may type.
    """
    text = " ".join(text.split())
    with suppress(OSError):
        typer.echo(f"{kind}: {printable(text) if whole else message_line(text)}", file=sys.stderr)


@contextmanager
def when_interrupted(advice: str) -> Iterator[None]:
    """Says ``advice`` if the user interrupts the block and nothing more exact is known."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(str(interrupt) or advice) from None


def folder_is_deleted() -> bool:
    """Whether the working directory has been deleted, so that relative paths lead nowhere."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False
