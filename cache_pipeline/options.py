"""Configs: frozen dataclasses whose fields carry their help, bounds and command-line option.

    steps: Annotated[int, Option("Optimiser steps.", OPTIMISATION, least=1)] = 4000

``check`` enforces the bounds. ``to_json`` and ``from_json`` save a config with a run. The command line has one option
per such field (cli/generated.py). A field whose type is itself a config adds the options of that config.
"""

from __future__ import annotations

import json
import math
import os
import re
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from cache_pipeline.errors import CheckpointError, OptionError, available

DATA, ENCODER, POLICY = "Data", "Encoder", "Policy"
OPTIMISATION, RUNNING, OUTPUT = "Optimisation", "Running", "Output"
GROUPS = (DATA, ENCODER, POLICY, OPTIMISATION, RUNNING, OUTPUT)

LARGEST = 2**63 - 1
"""Largest number that seeds, counts and sizes may have."""
MOST_STEPS = 10**9
"""Largest number of training steps: at 1000 steps/s they take eleven days."""
MAX_NAME_BYTES = 255
"""Longest name of a file or folder on common file systems."""
# Type of a field → accepted Python types, and the type in words.
KINDS: dict[Any, tuple[Any, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    bool: (bool, "true or false"),
    str: (str, "text"),
    Path: ((str, PurePath), "a path"),
    tuple: (tuple, "a list"),
    dict: (Mapping, "a mapping from name to value"),
}

MOST_PIXELS = 16384

BYTE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}

Config = TypeVar("Config")
Channels = tuple[float, float, float]


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
    """Raises OptionError for the first value of a config with another type, or outside its bounds or choices."""
    for item, option in options_of(config):
        value, kind = getattr(config, item.name), plain_type(item)
        if value is None and optional(item):
            continue
        _check_type(item.name, value, kind)
        if option.choices and value not in option.choices:
            raise OptionError(f"{item.name} {value!r} is unknown; {available(option.choices, value)}")
        if kind in (int, float):
            _check_number(item.name, value, option)
        elif not isinstance(value, bool):
            check_text(item.name, value)


def _check_type(name: str, value: Any, kind: Any) -> None:
    origin = get_origin(kind)
    kinds, wanted = KINDS.get(str if origin is Literal else origin or kind, (object, ""))
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise OptionError(f"{name} is {value!r}; it must be {wanted}")


def _check_number(name: str, value: float, option: Option) -> None:
    least = option.least if option.least is not None else -math.inf
    most = option.most if option.most is not None else (LARGEST if isinstance(value, Integral) else math.inf)
    if option.least is not None and option.most is not None:
        wanted = f"lie between {option.least} and {option.most}"
    elif option.above is not None:
        wanted = f"be a finite number above {option.above}"
    else:
        wanted = f"be at most {LARGEST}" if value > LARGEST and most == LARGEST else f"be at least {least}, and finite"
    if not (least <= value <= most and math.isfinite(value) and (option.above is None or value > option.above)):
        raise OptionError(f"{name} is {value}; it must {wanted}")


def check_text(name: str, value: Any) -> None:
    """Raises OptionError for an empty text or path, or one that no file system can hold; checks the items of a tuple.

    A tuple itself may be empty: it means none.
    """
    for item in value if isinstance(value, list | tuple) else (value,):
        if not isinstance(item, str | PurePath):
            continue
        text = str(item)
        if not text.strip():
            raise OptionError(f"{name} is empty; give a value, or leave it out")
        if "\0" in text:
            raise OptionError(f"{name} {text!r} holds a NUL character; leave it out")
        longest = max(text.split("/"), key=lambda part: len(os.fsencode(part)))
        if len(os.fsencode(longest)) > MAX_NAME_BYTES:
            size = len(os.fsencode(longest))
            raise OptionError(f"{name} {longest[:32]}… has {size} bytes; a name has at most {MAX_NAME_BYTES}")


def optional(item: Field[Any]) -> bool:
    """Whether None is a value of a field."""
    kind = get_args(item.type)[0] if get_origin(item.type) is Annotated else item.type
    return type(None) in get_args(kind)


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
    """Reads ``a,b`` as ``("a", "b")``, and ``none`` as no names. Text without a name stays, so that it is not found."""
    if text.strip().lower() == "none":
        return ()
    return tuple(part.strip() for part in text.split(",") if part.strip()) or (text,)


def image_shape(text: str) -> tuple[int, int]:
    """Reads ``76,76`` or ``76x76`` as (height, width) in pixels; raises OptionError."""
    match = re.fullmatch(r"(\d+)[,x](\d+)", text.strip())
    if match is None or not all(0 < len(side) <= 5 and 0 < int(side) <= MOST_PIXELS for side in match.groups()):
        raise OptionError(
            f"{text!r} is not an image shape; give height and width in pixels, 1 to {MOST_PIXELS}, such as 76,76"
        )
    return int(match[1]), int(match[2])


def channels(text: str) -> Channels:
    """Reads ``0.5,0.5,1/255`` as one number each for red, green and blue; raises OptionError."""
    parts = text.split(",")
    if len(parts) != 3 or not all(
        re.fullmatch(r"\s*-?\d{1,9}(\.\d{1,17})?(/[1-9]\d{0,8})?\s*", part) for part in parts
    ):
        raise OptionError(f"{text!r} is not one number each for red, green and blue, such as 0.5,0.5,0.5")
    red, green, blue = (
        float(number) / float(divisor or 1) for number, _, divisor in (part.partition("/") for part in parts)
    )
    return red, green, blue


def byte_count(text: str) -> int:
    """Reads ``512MiB``, ``2g`` or ``1000000`` as a number of bytes; raises OptionError."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([kmg]?i?)b?", text.strip().lower())
    if match is None or match[2] not in BYTE_UNITS or len(match[1]) > 20:
        raise OptionError(f"{text!r} is not a size; give bytes or a unit, such as 800MB or 2GiB")
    return int(float(match[1]) * BYTE_UNITS[match[2]])


def number_or_none(text: str) -> float | None:
    """Reads a number, or ``none``; raises OptionError."""
    try:
        return None if text.strip().lower() == "none" else float(text)
    except ValueError as error:
        raise OptionError(f"{text!r} is not a number; give one such as 0.5, or none") from error


def slices(text: str) -> tuple[tuple[int, int], ...]:
    """Reads ``3:6`` or ``3:6,10:13`` as pairs of start and stop; raises OptionError."""
    pairs = [item.split(":") for item in text.split(",")]
    if any(len(pair) != 2 or not all(re.fullmatch(r"\s*\d{1,6}\s*", part) for part in pair) for pair in pairs):
        raise OptionError(f"rotation_6d {text!r} is not START:STOP; give 3:6, or 3:6,10:13 for two rotations")
    return tuple((int(start), int(stop)) for start, stop in pairs)


def _not_a_value(name: str) -> None:
    raise OptionError(f"{name} is not a value; give a finite number")


def assignments(texts: list[str]) -> dict[str, Any]:
    """Reads ``NAME=VALUE``; a value that is not JSON stays text. Raises OptionError."""
    found: dict[str, Any] = {}
    for text in texts:
        name, mark, value = text.partition("=")
        if not mark or not name:
            raise OptionError(f"{text!r} is not NAME=VALUE; give for instance hidden=[512,512]")
        if name in found:
            raise OptionError(f"{name} is given twice, but only one counts; give it once")
        try:
            found[name] = json.loads(value, parse_constant=_not_a_value)
        except ValueError:
            found[name] = value
    return found
