"""Floor 10: the ``tuili`` command, one file per verb. Starts fast: a verb's file loads when the verb is called, torch,
server and engine load inside the commands.

A TuiliError ends as one message on stderr and exit code 1, a usage error with exit code 2; ``TUILI_LOG=DEBUG`` adds the
traceback.
"""

from __future__ import annotations

import errno
import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from tuili.base.errors import TuiliError

#: Each verb: the module whose ``app`` is its command, and what the list of verbs says of it.
VERBS = {
    "serve": ("tuili.cli.serve", "Serve MODEL over an OpenAI-compatible API until it is stopped."),
    "run": ("tuili.cli.run", "Chat with MODEL in the terminal, or answer once."),
    "doctor": ("tuili.cli.doctor", "Check this machine, from cores to disk; exit 1 if a check fails."),
    "bench": ("tuili.cli.lab", "Measure: a server from outside, or the engine in this process."),
    "plan": ("tuili.cli.plan", "Compute what fits and how fast it will be, before anything runs."),
    "config": ("tuili.cli.config", "Show and explain the options."),
    "train": ("tuili.cli.train", "Train models from recipes."),
}


class Verbs(TyperGroup):
    """The verbs by name and one line each; the command itself is made when it is called."""

    def __init__(self, **attributes: Any):
        super().__init__(**attributes)
        for name, (module, line) in VERBS.items():
            if find_spec(module):  # the trainer is not installed everywhere
                self.add_command(TyperCommand(name, help=line))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        # Any: the context and the command are click's in some versions of typer, typer's own in others.
        name, known, rest = super().resolve_command(ctx, args)
        if name is None or known is None:
            return name, known, rest
        return name, get_command(import_module(VERBS[name][0]).app), rest


app = typer.Typer(
    cls=Verbs,
    name="tuili",
    help="Tuili (推理): makes large language models cheaper to run, and proves it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        import tuili

        print(f"tuili {tuili.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the command."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command and leave the process with its exit code."""
    try:
        app(args=arguments, prog_name="tuili")
    except (TuiliError, OSError) as error:
        full = isinstance(error, OSError) and error.filename is None and error.errno in (errno.ENOSPC, errno.EIO)
        if os.environ.get("TUILI_LOG", "").upper() == "DEBUG" or not (full or isinstance(error, TuiliError)):
            raise
        colour, plain = ("\x1b[31m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
        print(f"{colour}tuili: error:{plain} {f'cannot write: {error}' if full else error}", file=sys.stderr)
        if full:
            os._exit(1)  # leaving in order would try again to write what is left in the buffers, and fail loudly
        sys.exit(1)
