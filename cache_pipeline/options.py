"""Configs: frozen dataclasses whose fields carry their help, bounds and command-line option.

    steps: Annotated[int, Option("Optimiser steps.", OPTIMISATION, least=1)] = 4000

``check`` enforces the bounds. ``to_json`` and ``from_json`` save a config with a run. The command line has one option
per such field (cli/generated.py). A field whose type is itself a config adds the options of that config.
"""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from cache_pipeline.errors import CheckpointError, ConfigError, available

DATA, ENCODER, POLICY = "Data", "Encoder", "Policy"
OPTIMISATION, RUNNING, OUTPUT = "Optimisation", "Running", "Output"
GROUPS = (DATA, ENCODER, POLICY, OPTIMISATION, RUNNING, OUTPUT)

BYTE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}

Config = TypeVar("Config")


@dataclass(frozen=True)
class Option:
    """Help, bounds and command-line flag of a config field.

    Attributes:
        help: one line for ``--help``.
        group: heading in ``--help``.
        flag: flag on the command line, by default from the field's name; ``--x/--no-x`` for a switch.
        least, most: inclusive bounds of a number; ``above`` is an exclusive lower bound.
        choices: all allowed values of a text.
        parse: converts the typed value to the value of the field.
        typed: type of the typed value, if it differs from the field's.
    """

    help: str
    group: str
    flag: str = ""
    least: float | None = None
    most: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()
    parse: Callable[[Any], Any] | None = None
    typed: Any = None


def option_of(item: Field[Any]) -> Option | None:
    """Returns the ``Option`` of a dataclass field, or None."""
    marks = get_args(item.type)[1:] if get_origin(item.type) is Annotated else ()
    return next((mark for mark in marks if isinstance(mark, Option)), None)


def options_of(cls: Any) -> Iterator[tuple[Field[Any], Option]]:
    """Yields the fields of a config that have an option, without those of nested configs."""
    for item in fields(cls):
        option = option_of(item)
        if option is not None:
            yield item, option


def flag_of(item: Field[Any], option: Option) -> str:
    """Returns the flag, such as ``--batch-size`` for ``batch_size``, unless the option names its flag."""
    return option.flag or f"--{item.name.replace('_', '-')}"


def check(config: Any) -> None:
    """Raises ConfigError for the first value of a config outside its bounds or choices."""
    for item, option in options_of(config):
        value = getattr(config, item.name)
        if value is None:
            continue
        if option.choices and value not in option.choices:
            raise ConfigError(f"{item.name} {value!r} is unknown; {available(option.choices, value)}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            _check_number(item.name, value, option)


def _check_number(name: str, value: float, option: Option) -> None:
    if option.least is not None and option.most is not None:
        if not option.least <= value <= option.most:
            raise ConfigError(f"{name} is {value}; it must lie between {option.least} and {option.most}")
    elif option.least is not None and not option.least <= value < math.inf:
        raise ConfigError(f"{name} is {value}; it must be at least {option.least}")
    elif option.above is not None and not option.above < value < math.inf:
        raise ConfigError(f"{name} is {value}; it must be a finite number above {option.above}")


def to_json(config: Any) -> dict[str, Any]:
    """Converts a config to a JSON object."""
    return {item.name: _plain(getattr(config, item.name)) for item in fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value) and not isinstance(value, type):
        return to_json(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def from_json(cls: type[Config], value: Any, nested: Mapping[str, Callable[[Any], Any]] | None = None) -> Config:
    """Reads the value of ``to_json``.

    Args:
        nested: field → function that reads its value, for values that are not configs of this kind.

    Raises:
        CheckpointError: a field is unknown, or a value does not fit.
    """
    try:
        return cls(**read_fields(cls, value, nested))
    except (TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the saved config is not a valid {cls.__name__}: {error}") from error


def read_fields(cls: Any, value: Any, nested: Mapping[str, Callable[[Any], Any]] | None = None) -> dict[str, Any]:
    """Reads the fields of a JSON object as values of the config; arguments and errors as in ``from_json``."""
    items = {item.name: item for item in fields(cls)}
    if not isinstance(value, dict) or not items.keys() >= value.keys():
        unknown = sorted(set(value) - set(items)) if isinstance(value, dict) else value
        raise CheckpointError(f"the saved config is not a {cls.__name__}: {unknown!r} is unknown to this version")
    try:
        return {name: _revived(items[name], item, (nested or {}).get(name)) for name, item in value.items()}
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the saved config is not a valid {cls.__name__}: {error}") from error


def _revived(item: Field[Any], value: Any, read: Callable[[Any], Any] | None) -> Any:
    if value is None:
        return None
    if read is not None:
        return read(value)
    kind = plain_type(item)
    if is_dataclass(kind) and isinstance(kind, type):
        return from_json(kind, value)
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        return tuple(Path(part) if inner is Path else tuple(part) if isinstance(part, list) else part for part in value)
    return Path(value) if kind is Path else value


def plain_type(item: Field[Any]) -> Any:
    """Returns the type of a field without ``Annotated`` and ``None``."""
    kind = get_args(item.type)[0] if get_origin(item.type) is Annotated else item.type
    if get_origin(kind) in (Union, types.UnionType):
        kinds = [part for part in get_args(kind) if part is not type(None)]
        return kinds[0] if len(kinds) == 1 else kind
    return kind


def names(text: str) -> tuple[str, ...]:
    """Reads ``a,b`` as ``("a", "b")``."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def image_shape(text: str) -> tuple[int, int]:
    """Reads ``76,76`` or ``76x76`` as (height, width) in pixels; raises ConfigError."""
    match = re.fullmatch(r"(\d+)[,x](\d+)", text.strip())
    if match is None or "0" in match.groups():
        raise ConfigError(f"{text!r} is not an image shape; give height and width in pixels, such as 76,76")
    return int(match[1]), int(match[2])


def byte_count(text: str) -> int:
    """Reads ``512MiB``, ``2g`` or ``1000000`` as a number of bytes; raises ConfigError."""
    match = re.fullmatch(r"([\d.]+)\s*([kmg]?i?)b?", text.strip().lower())
    if match is None or match[2] not in BYTE_UNITS:
        raise ConfigError(f"{text!r} is not a size; give bytes or a unit, such as 800MB or 2GiB")
    return int(float(match[1]) * BYTE_UNITS[match[2]])


def number_or_none(text: str) -> float | None:
    """Reads a number, or ``none``; raises ConfigError."""
    try:
        return None if text.strip().lower() == "none" else float(text)
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a number; give one such as 0.5, or none") from error


def slices(text: str) -> tuple[tuple[int, int], ...]:
    """Reads ``3:6`` or ``3:6,10:13`` as pairs of start and stop; raises ConfigError."""
    pairs = [item.split(":") for item in text.split(",")]
    if any(len(pair) != 2 or not all(part.strip().isdecimal() for part in pair) for pair in pairs):
        raise ConfigError(f"rotation_6d {text!r} is not START:STOP; give 3:6, or 3:6,10:13 for two rotations")
    return tuple((int(start), int(stop)) for start, stop in pairs)


def assignments(texts: list[str]) -> dict[str, Any]:
    """Reads ``NAME=VALUE``; a value that is not JSON stays text. Raises ConfigError."""
    found: dict[str, Any] = {}
    for text in texts:
        name, mark, value = text.partition("=")
        if not mark or not name:
            raise ConfigError(f"{text!r} is not NAME=VALUE; give for instance hidden=[512,512]")
        if name in found:
            raise ConfigError(f"{name} is given twice, but only one counts; give it once")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
