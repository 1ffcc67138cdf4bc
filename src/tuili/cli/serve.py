"""``tuili serve MODEL``: the OpenAI-compatible server."""

from __future__ import annotations

import typer

from tuili.base import log
from tuili.cli.options import ALL_GROUPS, Settings, takes_config
from tuili.cli.progress import loading

app = typer.Typer(add_completion=False)


@app.command()
@takes_config(*ALL_GROUPS)
def serve(settings: Settings) -> None:
    """Serve MODEL over an OpenAI-compatible API until it is stopped."""
    log.setup()
    from tuili.server.launch import run

    run(settings.config, loading)
