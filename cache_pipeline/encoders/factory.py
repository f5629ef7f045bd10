"""Encoders of the user's own: ``module_or_file.py:factory``, called without arguments, returns an ``nn.Module``.

A factory is code. It runs only if the user names it in this command or call: a factory whose name comes from a file
(a cache's or a run's metadata) is never imported; see ``choose_factory``.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

from cache_pipeline.errors import EncoderError, available
from cache_pipeline.files import digest, json_digest

FILE_MODULE = "_encoder_"
FORM = "give it as module:factory or path/to/file.py:factory"

Factories = str | Sequence[str] | None
"""The factories that the user names: one, several (for caches whose cameras have several), or none."""


class Made(NamedTuple):
    """What a factory returned, and a name for the text of its file that changes with every edit."""

    net: nn.Module
    source: str


def named_factories(encoder: Factories) -> tuple[str, ...]:
    """The factories named, as a tuple."""
    return () if encoder is None else (encoder,) if isinstance(encoder, str) else tuple(encoder)


def choose_factory(stored: str | None, encoder: Factories, where: object) -> str:
    """The factory to run for an encoder that was saved from ``stored``: always one that the user names.

    It may lie elsewhere than the stored one: whether it is the same is for its source and structure to say.

    Args:
        stored: the factory's name as it was saved; ``None`` for a ready module.
        encoder: the factories that the user names.
        where: the file that names ``stored``, for the message.

    Raises:
        EncoderError: the user names none, or several of which none has the stored one's name.
    """
    named = named_factories(encoder)
    if len(named) == 1:
        return named[0]
    what = "a ready module" if stored is None else f"the encoder factory {stored}"
    if not named:
        raise EncoderError(
            f"{where} was made by {what}; code that only a file names is not run; if you trust it, name it: "
            f"--encoder {stored or 'FILE.py:FACTORY'} (in Python: encoder={stored or 'FILE.py:FACTORY'!r})"
        )
    own = [name for name in named if name == stored] or [
        name for name in named if stored is not None and name.rpartition(":")[2] == stored.rpartition(":")[2]
    ]
    if not own:
        raise EncoderError(f"{where} was made by {what}, which is none of those named: {', '.join(named)}")
    return own[0]


def call_factory(reference: str) -> Made:
    """Imports and calls a factory.

    Args:
        reference: ``package.module:factory`` or ``path/to/file.py:factory``.

    Raises:
        EncoderError: it cannot be imported, is not there, or returns no ``nn.Module``.
    """
    place, _, name = reference.rpartition(":")
    if not place or not name:
        raise EncoderError(f"--encoder {reference!r} names no factory; {FORM}")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    factory = getattr(module, name, None)
    if not callable(factory):
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise EncoderError(f"{place} has no factory {name!r}; {available(callables, name)}")
    made = factory()
    if not isinstance(made, nn.Module):
        raise EncoderError(f"{reference} returned a {type(made).__name__}; it must return an nn.Module")
    return Made(made, _module_source(module))


def _module_source(module: ModuleType) -> str:
    """The name of a factory's file, in which its digest stands; of an installed module a digest of its text."""
    if module.__name__.startswith(FILE_MODULE):
        return module.__name__
    try:
        return digest(inspect.getsource(module).encode())
    except (OSError, TypeError):
        return module.__name__


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EncoderError(f"cannot import {name} for --encoder ({error}); {FORM}") from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise EncoderError(f"there is no file {path} for --encoder; {FORM}")
    # The name says what the content is: neither two files of one name nor one file and its edit stand for each other.
    name = FILE_MODULE + digest(path.read_bytes())
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise EncoderError(f"cannot import {path} for --encoder ({error})") from error
    return module


def structure_digest(net: nn.Module, source: str | None = None) -> str:
    """Digest of what a module computes apart from its weights.

    It covers the classes of all submodules, their plain attributes (numbers, strings, tuples of these), the source text
    of every class that is not torch's own, and all of the factory's file. It changes when that text changes, even where
    the values would not. It does not see functions that the factory's file imports from other files.

    Args:
        source: the factory's file, as in ``Made``; ``None`` for a ready module.
    """
    parts = [[name, type(module).__qualname__, _plain_attributes(module)] for name, module in net.named_modules()]
    classes = {base for module in net.modules() for base in type(module).__mro__}
    sources = {_source(kind) for kind in classes if kind.__module__.split(".")[0] not in ("torch", "builtins")}
    if source is not None and not any(text.startswith(f"{source}.") for text in sources):
        sources.add(source)
    return json_digest([parts, sorted(sources)])


def _plain_attributes(module: nn.Module) -> dict[str, str]:
    names = (name for name in vars(module) if not name.startswith("_") and name != "training")
    return {name: repr(vars(module)[name]) for name in names if _is_plain(vars(module)[name])}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _source(kind: type) -> str:
    if kind.__module__.startswith(FILE_MODULE):
        return f"{kind.__module__}.{kind.__qualname__}"
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return kind.__qualname__
