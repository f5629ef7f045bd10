"""Writes a run folder: one writer at a time, and a complete run at its path at every moment.

A run without a checkpoint has a marker file, so that the same command can start it again. A run that replaces another
is written to a hidden folder beside it, also marked, and is moved to its path with its first checkpoint.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from cache_pipeline.cache.lock import lock_if_possible
from cache_pipeline.encoders.image_encoder import ImageEncoder
from cache_pipeline.encoders.saving import save_encoder
from cache_pipeline.errors import CheckpointError, RunLockedError, described
from cache_pipeline.files import (
    PARTIAL,
    exchange,
    free_path,
    read_json,
    remove,
    remove_partial,
    resolved,
    sync_folder,
    write_json,
)
from cache_pipeline.runs.checkpoint import CHECKPOINTS, INDEX, has_checkpoint, remove_checkpoints
from cache_pipeline.runs.metrics import CSV_NAME, TENSORBOARD
from cache_pipeline.runs.record import RUN_JSON, RunRecord, write_record

logger = logging.getLogger("cache_pipeline")

MARKER = "unfinished.json"
MARK = "a run folder that is being written or replaced"
UNFINISHED: Literal["unfinished"] = "unfinished"
REPLACED: Literal["replaced"] = "replaced"
# Files that rollout and report add to a run.
ROLLOUTS, REPORT = "rollouts", "report.html"


class RunFolder:
    """Paths of a run that is being written.

    Attributes:
        place: the final path of the run.
        path: the current path: ``place``, or a hidden folder beside it while an older run is at ``place``.
        unsaved: whether ``place`` holds a run that was started but saved no checkpoint.
    """

    def __init__(self, place: Path, *, unsaved: bool = False) -> None:
        self.place, self.path, self.unsaved = place, place, unsaved

    def start(self, record: RunRecord, encoders: Mapping[str, ImageEncoder]) -> None:
        """Creates the folder with run.json and the encoders.

        Args:
            record: the contents of run.json.
            encoders: file name → encoder.
        """
        try:
            if is_run(self.place) and not self.unsaved:
                self.path = _hidden(self.place)
            self.path.mkdir(exist_ok=True)
            _mark(self.path, UNFINISHED, self.place)
            _remove_run(self.path)
            write_record(record, self.path)
            for file, encoder in encoders.items():
                save_encoder(encoder, self.path / file)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot write the run folder {self.place} ({described(error)})") from error

    def saved(self, step: int) -> Path:
        """Moves the run to its final path after its first checkpoint; call it after each one. Returns ``path``.

        After a checkpoint of step 0, which holds the initial weights, an older run is not replaced yet.
        """
        if self.path != self.place and step == 0:
            return self.path
        if self.path != self.place:
            replaced = self._take_place()
            self.path = self.place
            _unmark(self.path)
            if replaced is not None:
                _clear_replaced(replaced, self.place)
        _unmark(self.path)
        return self.path

    def _take_place(self) -> Path | None:
        """Moves the run to its final path; returns the path to which an older run was moved, if there was one."""
        if not self.place.exists():
            os.rename(self.path, self.place)
            return None
        _mark(self.place, REPLACED, self.place)
        replaced = self.path
        if not exchange(self.path, self.place):
            replaced = _hidden(self.place)
            os.rename(self.place, replaced)
            os.rename(self.path, self.place)
        sync_folder(self.place.parent)
        return replaced

    def give_up(self) -> None:
        """Removes a run that is not at its final path yet; it has saved no progress. The older run stays."""
        if self.path != self.place:
            shutil.rmtree(self.path, ignore_errors=True)


@contextmanager
def run_folder(out: Path, *, resume: bool, overwrite: bool, writes: bool = True) -> Iterator[RunFolder]:
    """Locks the run folder ``out`` for writing, after cleaning up after a killed process.

    Args:
        writes: False in a process of a distributed run that does not write.

    Raises:
        CheckpointError: the folder is not a run, or cannot be written or resumed with these options.
        RunLockedError: another process writes it.
    """
    place = resolved(out) if out.is_symlink() or out.name in ("", "..") else out
    if not writes:
        yield RunFolder(place)
        return
    with ExitStack() as held:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            lock_if_possible(place, RunLockedError, held)
            _put_in_order(place)
            for file in (RUN_JSON, CSV_NAME, f"{CHECKPOINTS}/{INDEX}"):
                remove_partial(place / file)
            unsaved = _state(place) == UNFINISHED
            if not unsaved:
                _check(place, resume=resume, overwrite=overwrite)
        except OSError as error:
            raise CheckpointError(f"cannot write the run folder {place} ({described(error)})") from error
        folder = RunFolder(place, unsaved=unsaved)
        held.callback(folder.give_up)
        yield folder


def is_run(path: Path) -> bool:
    """Whether a folder holds a run of this package, judged by its run.json."""
    return {"format", "kind", "config", "policy", "data"} <= _read(path / RUN_JSON).keys()


def _check(place: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises CheckpointError unless ``place`` can be written or resumed with these options. Changes nothing."""
    there = is_run(place)
    if resume and not there:
        raise CheckpointError(f"{place} holds no run to resume; omit --resume to start one")
    if there and not (resume or overwrite):
        raise CheckpointError(
            f"{place} holds a run; give --resume to continue it, --overwrite to replace it, or another --out"
        )
    if there and overwrite and place.is_mount():
        raise CheckpointError(f"{place} is a mount point and cannot be replaced; give a folder inside it as --out")
    if not there and place.exists() and not (place.is_dir() and all(map(_is_scrap, place.iterdir()))):
        raise CheckpointError(f"{place} exists and is not a run; give another --out")


def _put_in_order(place: Path) -> None:
    """Finishes or undoes the replacement that a killed process had begun, so that one complete run remains."""
    hidden = re.compile(rf"\.{re.escape(place.name)}\.[0-9a-f]{{8}}\.run")
    for path in [path for path in place.parent.iterdir() if hidden.fullmatch(path.name) and path.is_dir()]:
        state = _state(path) if _read(path / MARKER).get("run") == place.name else None
        if state == REPLACED and not place.exists():
            os.rename(path, place)
        elif state == REPLACED and is_run(place):
            _clear_replaced(path, place)
        elif state == UNFINISHED or all(map(_is_scrap, path.iterdir())):
            shutil.rmtree(path)
    if _state(place) == REPLACED or (_state(place) == UNFINISHED and has_checkpoint(place)):
        _unmark(place)


def _clear_replaced(old: Path, place: Path) -> None:
    """Removes a replaced run; moves other files in its folder to the run at ``place``."""
    try:
        _remove_run(old)
        _move_contents(old, place)
        _unmark(old)
        old.rmdir()
    except OSError as error:
        logger.warning("cannot remove %s, the replaced run (%s); the new run is complete", old, error)


def _remove_run(folder: Path) -> None:
    """Removes the files of a run from a folder; other files stay."""
    policy = _read(folder / RUN_JSON).get("policy")
    files = policy.get("encoder_files") if isinstance(policy, dict) else None
    encoders = sorted(set(files.values())) if isinstance(files, dict) else []
    remove_checkpoints(folder)
    for name in (TENSORBOARD, ROLLOUTS, REPORT, CSV_NAME, *(name for name in encoders if Path(name).name == name)):
        remove(folder / name)
    partial = re.compile(rf"\.({'|'.join(map(re.escape, (RUN_JSON, CSV_NAME, *encoders)))}){PARTIAL}")
    for path in list(folder.iterdir()):
        if partial.fullmatch(path.name) or _is_partial_marker(path):
            remove(path)
    remove(folder / RUN_JSON)


def _move_contents(folder: Path, target: Path) -> None:
    for path in list(folder.iterdir()):
        if path.name == CHECKPOINTS and path.is_dir() and (target / CHECKPOINTS).is_dir():
            _move_contents(path, target / CHECKPOINTS)
            path.rmdir()
        elif path.name != MARKER:
            os.rename(path, free_path(target / path.name))


def _hidden(place: Path) -> Path:
    return place.with_name(f".{place.name}.{secrets.token_hex(4)}.run")


def _mark(folder: Path, state: Literal["unfinished", "replaced"], place: Path) -> None:
    write_json(folder / MARKER, {"cache_pipeline": MARK, "state": state, "run": place.name})


def _unmark(folder: Path) -> None:
    (folder / MARKER).unlink(missing_ok=True)
    sync_folder(folder)


def _state(folder: Path) -> str | None:
    """Returns the state in the marker file of a folder; None if it has no valid marker."""
    value = _read(folder / MARKER)
    return value.get("state") if value.get("cache_pipeline") == MARK else None


def _is_scrap(path: Path) -> bool:
    """Whether a file is a marker, or the partial marker of a killed process."""
    return path.name == MARKER or _is_partial_marker(path)


def _is_partial_marker(path: Path) -> bool:
    return re.fullmatch(rf"\.{re.escape(MARKER)}{PARTIAL}", path.name) is not None


def _read(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
