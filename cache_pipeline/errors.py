"""Errors that users meet. Each says what is wrong, where, what is available and what to type next, in one line."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class CachePipelineError(Exception):
    """Base of every error of ours; the command line prints it as one line and exits with 1."""


class DatasetError(CachePipelineError, ValueError):
    """A robomimic file is missing, broken or does not hold what was asked for."""


class EncoderError(CachePipelineError, ValueError):
    """An encoder cannot be built as asked, or its weights cannot be had."""


class CacheError(CachePipelineError):
    """Base of the errors about a feature cache."""


class NotACacheError(CacheError, ValueError):
    """The path holds no feature cache."""


class IncompleteCacheError(CacheError):
    """The cache was cut off before it was finished; extraction can be resumed."""


class CorruptCacheError(CacheError):
    """Stored bytes, a ledger record or the manifest are not what was written."""


class CacheLockedError(CacheError):
    """Another live process is writing this cache."""


class StaleCacheError(CacheError):
    """The cache was made from something else than what is asked for now.

    Attributes:
        field: the item of the identity that differs, such as ``encoder.weights``.
        cached, wanted: its two values.
    """

    def __init__(self, field: str, cached: object, wanted: object, meaning: str, command: str) -> None:
        self.field, self.cached, self.wanted = field, cached, wanted
        super().__init__(
            f"the cache is stale: {field} is {cached!r} in the cache and {wanted!r} now: {meaning}; {command}"
        )


class ConfigError(CachePipelineError, ValueError):
    """Options that do not fit together or are out of range."""


class OptionError(ConfigError):
    """An option that would have no effect, or contradicts another; the command line exits with 2."""


class CheckpointError(CachePipelineError, ValueError):
    """A run or checkpoint is missing, damaged, or does not fit the data it is used with."""


class RunLockedError(CheckpointError):
    """Another live process is writing this run folder."""


class RunStopped(KeyboardInterrupt):
    """A run was asked to stop; it has saved all steps that it made. The message says how far it came."""


class MissingExtraError(CachePipelineError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


def install_command(extra: str) -> str:
    """What to type in a checkout to install an optional extra of this project."""
    return f"uv sync --extra {extra} (or pip install '.[{extra}]')"


class CheckFailedError(CachePipelineError):
    """A check ran to its end and its answer is no; the command line exits with 3."""


def available(names: Iterable[str], asked: str | None = None, limit: int = 12) -> str:
    """Lists the names that would have worked, the nearest to ``asked`` first.

    >>> available(["agentview_image", "eye_image"], "agentview")
    'available: agentview_image, eye_image (did you mean agentview_image?)'
    """
    names = list(names)
    if not names:
        return "available: none"
    shown = ", ".join(names[:limit]) + (f", … ({len(names) - limit} more)" if len(names) > limit else "")
    near = get_close_matches(asked, names, n=1) if asked is not None else []
    return f"available: {shown}" + (f" (did you mean {near[0]}?)" if near else "")
