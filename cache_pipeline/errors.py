"""Errors shown to users. Each is one line: what is wrong, where, what is available, and what to type next."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from difflib import get_close_matches
from typing import NamedTuple

from cache_pipeline.text import SHOWN_NAMES, listed, shortened

LONGEST_VALUE = 500


class CachePipelineError(Exception):
    """Base class of all errors of this project; the command line prints one line and exits with 1."""


class DatasetError(CachePipelineError, ValueError):
    """A dataset file is missing, damaged, or lacks what the user named."""


class EncoderError(CachePipelineError, ValueError):
    """An encoder cannot be built, or its weights cannot be loaded."""


class CacheError(CachePipelineError):
    """Base class of errors of a feature cache."""


class NotACacheError(CacheError, ValueError):
    """The path is not a feature cache."""


class IncompleteCacheError(CacheError):
    """The extraction into this cache has not finished; it can be resumed."""


class CorruptCacheError(CacheError):
    """Stored bytes, a ledger record or the manifest differ from what was written."""


class CacheLockedError(CacheError):
    """Another live process is writing this cache."""


class ChangedError(CacheError):
    """Another process has written an object since it was read."""


class UnitsFailedError(CacheError):
    """Units could not be made in several attempts; all others are done."""


class StaleCacheError(CacheError):
    """The cache was made from other data, another encoder or other settings than now.

    Attributes:
        field: the item of the identity that differs, such as ``encoder.weights``.
        cached, wanted: its value in the cache and its value now.
    """

    def __init__(self, field: str, cached: object, wanted: object, meaning: str, command: str) -> None:
        self.field, self.cached, self.wanted = field, cached, wanted
        super().__init__(field, cached, wanted, meaning, command)

    def __str__(self) -> str:
        field, cached, wanted, meaning, command = self.args
        return (
            f"the cache is stale: {field} is {_value(cached)} in the cache and {_value(wanted)} now: "
            f"{meaning}; {command}"
        )


def _value(value: object) -> str:
    return f"[{listed(map(repr, value))}]" if isinstance(value, list | tuple) else shortened(repr(value), LONGEST_VALUE)


class StoreError(CachePipelineError):
    """An object store does not answer, or denies access. It says nothing about the cache."""


class ConfigError(CachePipelineError, ValueError):
    """Options are inconsistent or out of range."""


class OptionError(ConfigError):
    """An option would have no effect or contradicts another; the command line exits with 2."""


class CheckpointError(CachePipelineError, ValueError):
    """A run or checkpoint is missing, damaged, or does not fit the data."""


class RunLockedError(CheckpointError):
    """Another live process is writing this run folder."""


class RunStopped(KeyboardInterrupt):
    """A run was interrupted and has saved all its steps. The message gives the last step."""


class MissingExtraError(CachePipelineError, ImportError):
    """An optional package is missing; the message names the extra that installs it."""


class Limit(NamedTuple):
    """A limit of the system that a command can reach: what it says, and what to do."""

    reached: str
    remedy: str


DISK_LIMITS = {
    errno.ENOSPC: Limit("no space left", "free some space"),
    errno.EDQUOT: Limit("disk quota exceeded", "free some space of your quota"),
    errno.EFBIG: Limit(
        "file size limit exceeded", "raise it with ulimit -f, or write to a disk that takes larger files"
    ),
}
"""Limits that a write can reach, by error number."""
TOO_MANY_FILES = Limit("too many open files", "raise the limit with ulimit -n")
LIMITS = {**DISK_LIMITS, errno.EMFILE: TOO_MANY_FILES, errno.ENFILE: TOO_MANY_FILES}
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


def described(error: Exception, then: str = "run the same command again") -> str:
    """Describes an operating-system error in one line: where, what, and what to do; any other error by its text.

    Args:
        error: what was raised.
        then: what to do once a limit of the system is raised.
    """
    if not isinstance(error, OSError):
        return str(error)
    where = " → ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    what = (error.strerror or str(error) or type(error).__name__).lower()
    if error.errno in LIMITS:
        hint = f"{LIMITS[error.errno].remedy} and {then}"
    elif error.errno in NOT_ALLOWED:
        hint = "get permission for this path, or give another path"
    else:
        hint = "check the path and its disk or network"
    return f"{where}: {what}; {hint}" if where else f"{what}; {hint}"


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def install_command(extra: str) -> str:
    """Returns the command that installs an optional extra of this project in a checkout."""
    return f"uv sync --extra {extra} (or pip install '.[{extra}]')"


class CheckFailedError(CachePipelineError):
    """A check has completed and failed; the command line exits with 3."""


def available(names: Iterable[str], asked: str | None = None, limit: int = SHOWN_NAMES) -> str:
    """Returns a list of the valid names for a message, with the name nearest to ``asked``.

    >>> available(["agentview_image", "eye_image"], "agentview")
    'available: agentview_image, eye_image (did you mean agentview_image?)'
    """
    names = list(names)
    if not names:
        return "available: none"
    near = get_close_matches(asked, names, n=1) if asked is not None else []
    return f"available: {listed(names, limit)}" + (f" (did you mean {near[0]}?)" if near else "")


def counted(count: int, noun: str) -> str:
    """Returns the count with its noun in singular or plural.

    >>> counted(1, "demo"), counted(2000, "image")
    ('1 demo', '2000 images')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
