"""Command-line options made from ``base.config``: name, type, choices, range, help, default. Order: defaults < file <
command line."""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from tuili.base import config as base
from tuili.base.config import Config

#: What a command that runs an engine offers; ``serve`` adds "server".
ENGINE_GROUPS = ("model", "cache", "scheduler")
ALL_GROUPS = (*ENGINE_GROUPS, "server")

DEFAULT, FILE, COMMAND_LINE = "default", "file", "command line"


@dataclass(frozen=True, slots=True)
class Settings:
    """The config of a command, and where each value was set: default, file or command line."""

    config: Config
    sources: Mapping[str, str]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def default_text(item: dataclasses.Field[Any]) -> str:
    """How the default of an option is shown; None is "auto"."""
    if item.default is None:
        return "auto"
    return str(item.default).lower() if isinstance(item.default, bool) else str(item.default)


def finite(value: float | None) -> float | None:
    """Callback of an option: nan and infinities are usage errors; minimum and maximum let nan through."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"must be a finite number, not {value}")
    return value


def help_text(item: dataclasses.Field[Any]) -> str:
    """One sentence and, where there is one, the unit."""
    unit = item.metadata["unit"]
    return f"{item.metadata['help']} ({unit})" if unit else item.metadata["help"]


def settings_from(file: Path | None, given: Mapping[str, Any]) -> Settings:
    """Defaults < file < what was given; None is "not given". ConfigError for unknown keys and bad values."""
    from_file = base.read_file(file) if file else {}
    from_line = {name: value for name, value in given.items() if value is not None}
    sources = {item.name: DEFAULT for item in base.options()}
    sources |= dict.fromkeys(from_file, f"{FILE} {file}") | dict.fromkeys(from_line, COMMAND_LINE)
    return Settings(base.load(file, from_line), sources)


def takes_config(*groups: str, model_argument: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of ``groups`` and ``--config FILE``; its parameter ``settings`` receives the result.

    A parameter of the command itself hides the option of the same name. The model is the argument MODEL, or
    ``--model``.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(command, include_extras=True)
        own = [
            parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in inspect.signature(command).parameters.items()
            if name != "settings"
        ]
        hidden = {parameter.name for parameter in own}
        items = [item for group in groups for item in base.options(group) if item.name not in hidden]
        made = [_parameter(item, model_argument) for item in items]

        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            file = values.pop("config_file")
            given = {item.name: _plain(values.pop(item.name)) for item in items}
            command(settings=settings_from(file, given), **values)

        parameters = sorted([*made, *own, _CONFIG_FILE], key=lambda p: p.name != "model")
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapper

    return decorate


_CONFIG_FILE = inspect.Parameter(
    "config_file",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None,
        typer.Option("--config", help="TOML file with options; the command line wins over it.", show_default=False),
    ],
)


def _parameter(item: dataclasses.Field[Any], model_argument: bool) -> inspect.Parameter:
    if item.name == "model" and model_argument:
        info: Any = typer.Argument(help=help_text(item), show_default=default_text(item))
    else:
        info = _option(item)
    kind = _type(item)
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info]
    )


def _option(item: dataclasses.Field[Any]) -> Any:
    kind, _ = base.option_type(item.name)
    meta, name = item.metadata, flag(item.name)
    limits = {} if kind not in (int, float) else {"min": meta["minimum"], "max": meta["maximum"]}
    return typer.Option(
        f"{name}/--no{name[1:]}" if kind is bool else name,
        help=help_text(item),
        show_default=default_text(item),
        rich_help_panel=f"{meta['group'].capitalize()} options",
        **limits,
    )


def _type(item: dataclasses.Field[Any]) -> Any:
    """The option's type; its choices become an enum, so that a wrong one is a usage error that lists them."""
    kind, _ = base.option_type(item.name)
    choices = item.metadata["choices"]
    return enum.StrEnum(item.name, {choice: choice for choice in choices}) if choices else kind


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value
