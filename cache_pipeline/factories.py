"""Finds a factory of the user's own code: a function of an installed module or of a file.

A factory is code. It runs only if the user names it in this command or call.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from cache_pipeline.errors import ConfigError, available

FORM = "give it as module:factory or path/to/file.py:factory"


class Factory(NamedTuple):
    """A factory, and the module that holds it."""

    make: Callable[[], Any]
    module: ModuleType


def find_factory(reference: str, option: str, module_name: Callable[[bytes], str]) -> Factory:
    """Imports the module of a factory.

    Args:
        reference: ``package.module:factory`` or ``path/to/file.py:factory``.
        option: the option that names it, for messages.
        module_name: makes the name of a file's module from its content, so that a file and its edit are two modules.

    Raises:
        ConfigError: it cannot be imported, or does not exist.
    """
    place, _, name = reference.rpartition(":")
    if not place or not name:
        raise ConfigError(f"{option} {reference!r} names no factory; {FORM}")
    if place.endswith(".py"):
        module = _import_file(Path(place), option, module_name)
    else:
        module = _import_module(place, option)
    make = getattr(module, name, None)
    if not callable(make):
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"{place} has no factory {name!r}; {available(callables, name)}")
    return Factory(make, module)


def _import_module(name: str, option: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"cannot import {name} for {option} ({error}); {FORM}") from error


def _import_file(path: Path, option: str, module_name: Callable[[bytes], str]) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"there is no file {path} for {option}; {FORM}")
    name = module_name(path.read_bytes())
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise ConfigError(f"cannot import {path} for {option} ({error})") from error
    return module
