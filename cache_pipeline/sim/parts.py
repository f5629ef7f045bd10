"""A file that is made of parts: an interrupted command keeps the finished ones, and the same command goes on with them.

The parts are small files in a hidden folder beside the file. Each is whole or absent.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from cache_pipeline.cache.lock import lock_if_possible
from cache_pipeline.errors import CachePipelineError, ConfigError, counted, described
from cache_pipeline.files import PARTIAL, FileKind, check_output, json_digest, output_file, read_json, write_json
from cache_pipeline.text import shortened

logger = logging.getLogger("cache_pipeline")

MARKER = "parts.json"
MARK = "finished parts of a file that is being written"
PART = re.compile(r"part_(\d{6})\.(hdf5|json)")
FILE = rf"(part_\d{{6}}\.(hdf5|json)|{re.escape(MARKER)})"
OURS = re.compile(rf"{FILE}|\.{FILE}{PARTIAL}")


class PartedFileError(CachePipelineError, RuntimeError):
    """Another process writes the file, or its folder cannot be written."""


class Parts(NamedTuple):
    """The folder of finished parts, and the temporary path of the file that is made of them."""

    folder: Path
    file: Path

    def path(self, number: int, suffix: str = "hdf5") -> Path:
        """Returns the path of a part: an HDF5 file, or a JSON file of one that holds no data."""
        return part_path(self.folder, number, suffix)

    def finished(self) -> dict[int, str]:
        """Returns number → suffix of the parts that are there."""
        found = (PART.fullmatch(path.name) for path in self.folder.iterdir())
        return {int(match[1]): match[2] for match in found if match is not None}

    def clear(self) -> None:
        """Removes all parts."""
        for number, suffix in self.finished().items():
            self.path(number, suffix).unlink()


def part_path(folder: Path, number: int, suffix: str = "hdf5") -> Path:
    """Returns the path of a part in a folder."""
    return folder / f"part_{number:06d}.{suffix}"


@contextmanager
def parted_file(
    out: Path, kind: FileKind, identity: Mapping[str, Any], noun: str, *, overwrite: bool, sources: Iterable[Path] = ()
) -> Iterator[Parts]:
    """Yields the finished parts of a file that a command writes. On success the temporary file becomes ``out``.

    Args:
        out, kind, overwrite, sources: as in ``check_output``.
        identity: a JSON value that decides the content of each part. Parts of another one are not used.
        noun: what a part is, such as ``attempt``.

    Raises:
        ConfigError: the path is taken and may not be replaced.
        PartedFileError: another process writes the file.
        CachePipelineError: the disk is full. Finished parts are kept.
    """
    real = check_output(out, kind, overwrite=overwrite, sources=sources)
    folder = real.with_name(f".{real.name}.{json_digest(identity)[:8]}.parts")
    with ExitStack() as held:
        try:
            real.parent.mkdir(parents=True, exist_ok=True)
            lock_if_possible(real, PartedFileError, held)
        except OSError as error:
            raise PartedFileError(f"cannot write {out} ({described(error)})") from error
        held.enter_context(_kept_if_interrupted(folder, noun))
        with output_file(out, kind, overwrite=overwrite, sources=sources) as partial:
            _tell_of_others(real, folder, identity, noun)
            _open(folder, identity)
            yield Parts(folder, partial)
        _remove(folder)


@contextmanager
def _kept_if_interrupted(folder: Path, noun: str) -> Iterator[None]:
    """Keeps a folder that holds parts if the block fails; removes one that holds none."""
    try:
        yield
    except BaseException as error:
        kept = _count(folder)
        if not kept:
            _remove(folder)
        elif isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(
                f"{counted(kept, f'finished {noun}')} {'is' if kept == 1 else 'are'} kept; "
                "run the same command again to continue"
            ) from None
        raise


def _open(folder: Path, identity: Mapping[str, Any]) -> None:
    """Makes the folder, unless an interrupted command has left it."""
    if _identity(folder) == identity:
        return
    try:
        folder.mkdir()
    except FileExistsError:
        if any(OURS.fullmatch(path.name) is None for path in folder.iterdir()) or _count(folder):
            raise ConfigError(f"{folder} exists and was not made by this command; move it away") from None
    write_json(folder / MARKER, {"cache_pipeline": MARK, "identity": identity})


def _identity(folder: Path) -> Any | None:
    """Returns the identity in the marker of a folder; None if it has no valid marker."""
    try:
        value = read_json(folder / MARKER)
    except (OSError, ValueError, RecursionError):
        return None
    return value.get("identity") if isinstance(value, dict) and value.get("cache_pipeline") == MARK else None


def _count(folder: Path) -> int:
    return sum(PART.fullmatch(path.name) is not None for path in folder.iterdir()) if folder.is_dir() else 0


def _tell_of_others(real: Path, own: Path, identity: Mapping[str, Any], noun: str) -> None:
    """Names the parts that a command with other settings has left."""
    name = re.compile(rf"\.{re.escape(real.name)}\.[0-9a-f]{{8}}\.parts")
    for folder in sorted(path for path in real.parent.iterdir() if name.fullmatch(path.name) and path != own):
        other = _identity(folder)
        if isinstance(other, dict):
            logger.warning(
                "%s holds %s of an interrupted command with other settings (%s), which are not used; continue it with "
                "its settings, or remove the folder",
                folder,
                counted(_count(folder), f"finished {noun}"),
                _difference(other, identity),
            )


def _difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    name = next((name for name in {**here, **there} if there.get(name) != here.get(name)), "")
    return f"{name} is {shortened(there.get(name))} there and {shortened(here.get(name))} here"


def _remove(folder: Path) -> None:
    """Removes the folder with its parts; other files stay."""
    if not folder.is_dir():
        return
    for path in list(folder.iterdir()):
        if OURS.fullmatch(path.name) is not None:
            path.unlink(missing_ok=True)
    try:
        folder.rmdir()
    except OSError as error:
        logger.warning("cannot remove %s (%s); nothing in it is needed", folder, error)
