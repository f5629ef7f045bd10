"""Custom encoders: ``module_or_file.py:factory`` is called without arguments and returns an ``nn.Module``.

A factory is code. It runs only if the user names it in this command or call. A factory named only by the metadata of a
cache or run is never imported; see ``choose_factory``.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

from cache_pipeline.errors import ConfigError, EncoderError
from cache_pipeline.factories import find_factory
from cache_pipeline.files import digest, json_digest

FILE_MODULE = "_encoder_"

Factories = str | Sequence[str] | None
"""Factories that the user names: one, several (if cameras have different ones), or none."""


class Made(NamedTuple):
    """The module that a factory returned, and a name of its file that changes with every edit."""

    net: nn.Module
    source: str


def named_factories(encoder: Factories) -> tuple[str, ...]:
    """Returns the named factories as a tuple."""
    return () if encoder is None else (encoder,) if isinstance(encoder, str) else tuple(encoder)


def choose_factory(stored: str | None, encoder: Factories, where: object) -> str:
    """Chooses the factory for a saved encoder from those that the user names.

    Its path may differ from the stored one; the caller compares source and structure.

    Args:
        stored: name of the factory in the saved file; ``None`` for a module without factory.
        encoder: the factories that the user names.
        where: the file that names ``stored``, for the message.

    Raises:
        EncoderError: the user names no factory, or several without the name of the stored one.
    """
    named = named_factories(encoder)
    if len(named) == 1:
        return named[0]
    what = "a module without factory" if stored is None else f"the encoder factory {stored}"
    if not named:
        raise EncoderError(
            f"{where} was made by {what}; a factory runs only if you name it; if you trust it, add "
            f"--encoder {stored or 'FILE.py:FACTORY'} (in Python: encoder={stored or 'FILE.py:FACTORY'!r})"
        )
    own = [name for name in named if name == stored] or [
        name for name in named if stored is not None and name.rpartition(":")[2] == stored.rpartition(":")[2]
    ]
    if not own:
        raise EncoderError(f"{where} was made by {what}, which is not among the named factories: {', '.join(named)}")
    return own[0]


def call_factory(reference: str) -> Made:
    """Imports and calls a factory.

    Args:
        reference: ``package.module:factory`` or ``path/to/file.py:factory``.

    Raises:
        EncoderError: it cannot be imported, does not exist, or does not return an ``nn.Module``.
    """
    try:
        factory = find_factory(reference, "--encoder", lambda content: FILE_MODULE + digest(content))
    except ConfigError as error:
        raise EncoderError(str(error)) from error
    made = factory.make()
    if not isinstance(made, nn.Module):
        raise EncoderError(f"{reference} returned a {type(made).__name__}; it must return an nn.Module")
    return Made(made, _module_source(factory.module))


def _module_source(module: ModuleType) -> str:
    """Returns the module name of a factory's file, which contains its digest; for installed modules a text digest."""
    if module.__name__.startswith(FILE_MODULE):
        return module.__name__
    try:
        return digest(inspect.getsource(module).encode())
    except (OSError, TypeError):
        return module.__name__


def structure_digest(net: nn.Module, source: str | None = None) -> str:
    """Returns a digest of the code and attributes of a module, without its weights.

    Covers the classes of all submodules, their plain attributes (numbers, strings, tuples of these), the source text of
    every class outside torch, and the whole file of the factory. Any edit of that text changes the digest. Functions
    that the factory's file imports from other files are not covered.

    Args:
        source: the factory's file, as in ``Made``; ``None`` for a module without factory.
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
