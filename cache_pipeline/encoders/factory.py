"""Encoders of the user's own: ``module_or_file.py:factory``, called without arguments, returns an ``nn.Module``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from cache_pipeline.errors import EncoderError, available
from cache_pipeline.files import digest, json_digest

FILE_MODULE = "_encoder_"
FORM = "give it as module:factory or path/to/file.py:factory"


def call_factory(reference: str) -> nn.Module:
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
    return made


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


def structure_digest(net: nn.Module) -> str:
    """Digest of what a module computes apart from its weights.

    It covers the classes of all submodules, their plain attributes (numbers, strings, tuples of these), and the source
    text of every class that is not torch's own; of classes from a factory's file all of the file. It changes when that
    text changes, even where the values would not.
    """
    parts = [[name, type(module).__qualname__, _plain_attributes(module)] for name, module in net.named_modules()]
    classes = {base for module in net.modules() for base in type(module).__mro__}
    sources = sorted(_source(kind) for kind in classes if kind.__module__.split(".")[0] not in ("torch", "builtins"))
    return json_digest([parts, sources])


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
