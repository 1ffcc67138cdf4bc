"""A model's shape without its weights: from a directory, a config.json, a model of the package, or the hub."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from tuili.base.errors import ModelError
from tuili.layers.spec import ModelSpec
from tuili.models.checkpoint import EMBEDDED, HUB_ID, QUANTIZED_BESIDE, open_checkpoint, read_config
from tuili.models.quantized import spec_of


def open_spec(name: str) -> ModelSpec:
    """The shape of the model called ``name``; from the hub only its settings are fetched. Raises ModelError."""
    path = Path(name).expanduser()
    if path.is_dir() or name in EMBEDDED:
        return open_checkpoint(name).spec
    if not path.is_file() and HUB_ID.fullmatch(name):
        path = _fetch(name)
    if not path.is_file():
        raise ModelError(f"there is no directory or config.json {name!r}, and it is no hub id (owner/name)")
    return spec_of(read_config(path))


def _fetch(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        for beside in QUANTIZED_BESIDE:
            with suppress(EntryNotFoundError):
                hf_hub_download(name, beside)
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # the hub client raises its own, httpx's and the system's errors, by version
        why = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
        raise ModelError(
            f"there is no directory {name!r}, and the Hugging Face hub did not give its config.json ({why}); "
            "give a local directory or a config.json"
        ) from error
