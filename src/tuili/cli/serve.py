"""``tuili serve MODEL``: the OpenAI-compatible server."""

from __future__ import annotations

from tuili.base import log
from tuili.cli.options import ALL_GROUPS, Settings, takes_config
from tuili.cli.progress import loading


@takes_config(*ALL_GROUPS)
def serve(settings: Settings) -> None:
    """Serve MODEL over an OpenAI-compatible API until it is stopped."""
    log.setup()
    from tuili.server.launch import run

    run(settings.config, loading)
