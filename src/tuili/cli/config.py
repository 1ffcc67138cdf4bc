"""``tuili config``: the options of the engine and the server. What they mean, where each was set, what "auto"
becomes."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

from tuili.base import config as base
from tuili.base.errors import ConfigError, nearest
from tuili.cli.options import ALL_GROUPS, DEFAULT, Settings, default_text, flag, takes_config

app = typer.Typer(help="Show and explain the options.", no_args_is_help=True, add_completion=False)

#: Where a value of the resolved config comes from when nobody set it.
RESOLVED = "auto (resolved)"


@app.command("show")
@takes_config(*ALL_GROUPS)
def show(
    settings: Settings,
    resolve: Annotated[
        bool, typer.Option("--resolve/--no-resolve", help="Turn every auto into the value for this model and machine.")
    ] = True,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    toml: Annotated[bool, typer.Option("--toml", help="A TOML file that --config reads back.")] = False,
) -> None:
    """The effective config: each value and whether default, file, command line or this machine set it."""
    effective = _resolved(settings) if resolve else settings
    if toml:
        print(base.dump(effective.config), end="")
    elif json_output:
        values = dataclasses.asdict(effective.config)
        print(
            json.dumps({name: {"value": v, "source": effective.sources[name]} for name, v in values.items()}, indent=2)
        )
    else:
        _print_table(effective)


def _resolved(settings: Settings) -> Settings:
    from tuili.base.hardware import probe
    from tuili.engine.device import able
    from tuili.engine.resolve import resolve
    from tuili.models.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(settings.config.model, settings.config.revision)
    config, machine = able(settings.config, probe())
    config = resolve(config, checkpoint.spec, machine)
    changed = {name for name in settings.sources if getattr(config, name) != getattr(settings.config, name)}
    return Settings(config, {**settings.sources, **dict.fromkeys(changed, RESOLVED)})


def _print_table(settings: Settings) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("option", "value", "unit", "set by", box=None, header_style="bold")
    for item in base.options():
        value, source = getattr(settings.config, item.name), settings.sources[item.name]
        table.add_row(
            item.name, _shown(value), item.metadata["unit"], source, style="dim" if source == DEFAULT else None
        )
    Console().print(table)


def _shown(value: Any) -> str:
    if value is None:
        return "auto"
    return str(value).lower() if isinstance(value, bool) else str(value)


@app.command("explain")
@takes_config(*ALL_GROUPS, model_argument=False)
def explain(
    settings: Settings, key: Annotated[str, typer.Argument(help="Name of an option, with or without dashes.")]
) -> None:
    """What one option means: sentence, type, unit, range, default, and its value here with where it was set."""
    items = {item.name: item for item in base.options()}
    name = key.lstrip("-").replace("-", "_")
    if name not in items:
        raise ConfigError(f"unknown option {key!r}.{nearest(name, items)}")
    item, value = items[name], getattr(settings.config, name)
    print(f"{flag(name)}: {item.metadata['help']}")
    for label, text in _facts(item):
        print(f"  {label:<8} {text}")
    print(f"  {'value':<8} {_shown(value)} (set by: {settings.sources[name]})")


def _facts(item: dataclasses.Field[Any]) -> list[tuple[str, str]]:
    kind, _ = base.option_type(item.name)
    meta = item.metadata
    low, high = (("" if meta[end] is None else f"{meta[end]:g}") for end in ("minimum", "maximum"))
    facts = [
        ("type", kind.__name__),
        ("unit", meta["unit"]),
        ("choices", ", ".join(meta["choices"])),
        ("range", f"{low} .. {high}".strip() if low or high else ""),
        ("default", default_text(item)),
        ("group", meta["group"]),
    ]
    return [(label, text) for label, text in facts if text]


@app.command("reference")
def reference() -> None:
    """The option reference as Markdown: docs/configuration.md is this output."""
    print(markdown(), end="")


def markdown() -> str:
    """docs/configuration.md, made from ``base/config.py``."""
    lines = [
        "# Configuration",
        "",
        "<!-- Written by `tuili config reference > docs/configuration.md`; a test holds it current. Do not edit. -->",
        "",
        "Every option has one name: `max_num_seqs` in a TOML file is `--max-num-seqs` on the command line.",
        "Order: defaults < file (`--config FILE`, flat keys or a table per group) < command line.",
        "*auto* becomes a number once, when the model and the machine are known: `tuili config show MODEL` prints what",
        "it became and who set it, `tuili config show MODEL --toml` writes a file that reproduces the run,",
        "`tuili config explain KEY` explains one option.",
    ]
    for group in ALL_GROUPS:
        lines += [
            "",
            f"## {group.capitalize()}",
            "",
            "| option | type | default | unit | meaning |",
            "|---|---|---|---|---|",
        ]
        lines += [_row(item) for item in base.options(group)]
    return "\n".join(lines) + "\n"


def _row(item: dataclasses.Field[Any]) -> str:
    facts = dict(_facts(item))
    kind = facts["choices"].replace(", ", " \\| ") if "choices" in facts else facts["type"]
    limits = f" ({facts['range']})" if "range" in facts else ""
    default = f"*{facts['default']}*" if item.default is None else f"`{facts['default']}`"
    return f"| `{flag(item.name)}` | {kind}{limits} | {default} | {facts.get('unit', '')} | {item.metadata['help']} |"
