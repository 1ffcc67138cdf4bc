"""Floor 10: the ``tuili`` command, one file per verb. Starts fast: torch, server and engine load inside the commands.

A TuiliError ends as one message on stderr and exit code 1, a usage error with exit code 2; ``TUILI_LOG=DEBUG`` adds the
traceback.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated

import typer

from tuili.base.errors import TuiliError
from tuili.cli import config, doctor, lab, plan, run, serve

app = typer.Typer(
    name="tuili",
    help="Tuili (推理): makes large language models cheaper to run, and proves it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("serve")(serve.serve)
app.command("run")(run.run)
app.add_typer(lab.app, name="bench")
app.add_typer(plan.app, name="plan")
app.command("doctor")(doctor.doctor)
app.add_typer(config.app, name="config")


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


def _add_train() -> None:
    """The trainer's command, where it is there."""
    try:
        from tuili.cli import train
    except ModuleNotFoundError as error:
        if error.name != "tuili.cli.train":
            raise
    else:
        app.add_typer(train.app, name="train")


_add_train()


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
