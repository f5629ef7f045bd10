"""Generates the options of a command from the fields of config dataclasses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import typer

from cache_pipeline.options import Option, flag_of, option_of, plain_type

Config = TypeVar("Config")
Command = Callable[..., None]


class Given:
    """The values of a command's generated options.

    Args:
        values: parameter name → value.
        typed: names of the parameters on the command line.
    """

    def __init__(self, values: Mapping[str, Any], typed: set[str]) -> None:
        self._values, self._typed = values, typed

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def any_typed(self, cls: Any, but: Collection[str] = ()) -> bool:
        """Whether an option of a config, other than those in ``but``, is on the command line."""
        return bool(self._typed & (parameter_names(cls) - set(but)))

    def config(self, cls: type[Config], **others: Any) -> Config:
        """Makes a config from the given values and from ``others``, its fields without an option."""
        return cls(**self._fields(cls, lambda name: True), **others)

    def over(self, cls: type[Config], saved: Mapping[str, Any], **others: Any) -> Config:
        """Makes a config from saved fields; options on the command line override them."""
        found = {**saved, **self._typed_fields(cls), **others}
        for item in fields(cls):  # type: ignore[arg-type]
            if _nested(item) and (typed := self._typed_fields(item.type)):
                kind = plain_type(item)
                found[item.name] = replace(saved[item.name], **typed) if item.name in saved else kind(**typed)
        return cls(**found)

    def _typed_fields(self, cls: Any) -> dict[str, Any]:
        return self._fields(cls, lambda name: name in self._typed, flat=True)

    def _fields(self, cls: Any, wanted: Callable[[str], bool], *, flat: bool = False) -> dict[str, Any]:
        found = {}
        for item in fields(cls):
            option = option_of(item)
            if option is not None and (name := _name(item, option)) in self._values and wanted(name):
                value = self._values[name]
                if option.parse is None:
                    found[item.name] = value
                elif value is not None:
                    found[item.name] = option.parse(value)
            elif not flat and _nested(item):
                found[item.name] = self.config(plain_type(item))
        return found


@dataclass(frozen=True)
class Parameter:
    """One generated option."""

    name: str
    annotation: Any
    default: Any


def was_typed(ctx: Any, name: str) -> bool:
    """Whether a parameter is on the command line."""
    return bool(ctx.get_parameter_source(name).name == "COMMANDLINE")


def generated(*configs: Any) -> Callable[[Command], Command]:
    """Adds an option for each field of the configs to a command, which gets them as ``given``.

    Configs may share fields of a common base.
    """

    def decorate(function: Command) -> Command:
        own = [
            parameter
            for parameter in inspect.signature(function, eval_str=True).parameters.values()
            if parameter.name != "given"
        ]
        made = {made.name: made for config in configs for made in _parameters(config)}.values()
        names = [parameter.name for parameter in own]
        context = Parameter("ctx", typer.Context, inspect.Parameter.empty)

        def command(ctx: typer.Context, **values: Any) -> None:
            typed = {name for name in values if was_typed(ctx, name)}
            rest = {name: value for name, value in values.items() if name not in names}
            function(**{name: values[name] for name in names}, given=Given(rest, typed))

        listed = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in own]
        listed += [
            inspect.Parameter(
                item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=item.annotation
            )
            for item in (context, *made)
        ]
        command.__signature__ = inspect.Signature(listed)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in listed}
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        return command

    return decorate


def parameter_names(cls: Any, only: Collection[str] | None = None) -> set[str]:
    """Returns the names of the parameters made of a config's fields, or only of some fields."""
    chosen = [item for item in fields(cls) if only is None or item.name in only]
    return {parameter.name for item in chosen for parameter in _parameters_of(item)}


def _parameters(cls: Any) -> Iterator[Parameter]:
    for item in fields(cls):
        yield from _parameters_of(item)


def _parameters_of(item: Field[Any]) -> Iterator[Parameter]:
    option = option_of(item)
    if option is not None:
        yield Parameter(_name(item, option), _annotation(item, option), _default(item, option))
    elif _nested(item):
        yield from _parameters(plain_type(item))


def _annotation(item: Field[Any], option: Option) -> Any:
    kind, text = get_args(item.type)[0] if option.typed is None else option.typed, option.help
    bounds: dict[str, Any] = {}
    if option.parse is not None and kind is not bool:
        bounds = {"metavar": "FILE" if kind == list[Path] else "NAME=VALUE"} if get_origin(kind) is list else {}
        kind = kind | None
        text += f"  [default: {item.default}]" if isinstance(item.default, float) else ""
    elif plain_type(item) in (int, float):
        bounds = {"min": option.least, "max": option.most}
    return Annotated[kind, typer.Option(flag_of(item, option), help=text, rich_help_panel=option.group, **bounds)]


def _default(item: Field[Any], option: Option) -> Any:
    if option.typed is bool:
        return False
    if option.parse is not None:
        return None
    if item.default is not MISSING:
        return item.default
    return inspect.Parameter.empty


def _name(item: Field[Any], option: Option) -> str:
    """Returns the parameter name that belongs to the flag."""
    return flag_of(item, option).split("/")[0].removeprefix("--").replace("-", "_")


def _nested(item: Field[Any]) -> bool:
    kind = item.type
    return is_dataclass(kind) and get_origin(kind) is None
