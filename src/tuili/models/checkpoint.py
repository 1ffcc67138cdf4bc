"""Where a model's files are: a directory, a model that ships with Tuili, or a Hugging Face hub id. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tuili
from tuili.base.errors import ModelError
from tuili.base.log import get
from tuili.layers.spec import ModelSpec
from tuili.models import Family, family_of
from tuili.models.fields import Fields
from tuili.models.names import EMBEDDING, HEAD
from tuili.models.quantized import layouts_of, spec_of
from tuili.models.quantized.layout import Layout
from tuili.models.read import read_json
from tuili.models.shards import has_another_head

log = get(__name__)

#: Names of the models inside the package, and their directories below it.
EMBEDDED = {"embedded": "embedded/target", "embedded-draft": "embedded/draft"}
#: What is worth fetching from the hub: weights, tokenizer, settings. No pickles, no code.
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]
#: The one folder that counts: chat templates by name.
TEMPLATES = "additional_chat_templates"
#: Other layouts of the same weights. Patterns know no "other than": every folder that differs in one of its letters.
HUB_SKIP = [f"{TEMPLATES[:i]}[!{letter}]*/*" for i, letter in enumerate(TEMPLATES)]
HUB_SKIP += [f"{TEMPLATES[:i]}/*" for i in range(1, len(TEMPLATES))] + [f"{TEMPLATES}?*/*", "consolidated*.safetensors"]
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class Checkpoint:
    """A model on this machine's disk, its JSON files read. ``name`` is what the user called it."""

    name: str
    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any] = field(default_factory=dict)
    tokenizer_config: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def family(self) -> type[Family]:
        return family_of(self.config)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """``config``, corrected where the files hold a head of their own, which it calls tied: as in transformers."""
        if not self.family.parse(self.config).tied or not has_another_head(self.path, self.family.prefixes):
            return self.config
        log.warning(
            "%s: config.json says tie_word_embeddings, but the files hold an %s.weight other than %s.weight: the head "
            "is used as it is stored (tie_word_embeddings=false says so)",
            *(self.path, HEAD, EMBEDDING),
        )
        return self.config | {"tie_word_embeddings": False}

    @cached_property
    def spec(self) -> ModelSpec:
        """The model's shape. End-of-text ids are generation_config.json's where it has some, as in transformers."""
        spec = spec_of(self.settings)
        ends = Fields(self.generation_config, "generation_config.json").token_ids("eos_token_id")
        return replace(spec, eos_token_ids=ends) if ends else spec

    @cached_property
    def layouts(self) -> dict[str, Layout]:
        """How the files hold the matrices that are quantized already, by their modules' names."""
        return layouts_of(self.settings, self.family, self.spec)

    def file(self, name: str) -> Path | None:
        """The path of ``name`` in the checkpoint, or None where it has no such file."""
        path = self.path / name
        return path if path.is_file() else None


def open_checkpoint(name_or_dir: str | Path, revision: str | None = None) -> Checkpoint:
    """The checkpoint called ``name_or_dir``; ``revision`` is a hub branch, tag or commit.

    Tried in order: a directory, a name in ``EMBEDDED``, a hub id (fetched, or from the hub's cache where the machine is
    offline). Raises ModelError saying what to do.
    """
    path = locate(str(name_or_dir), revision)
    if not (path / "config.json").is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise ModelError(f"{path} has no config.json (found: {found}); give the directory of a Hugging Face checkpoint")
    config = read_config(path / "config.json")
    if config.get("auto_map"):
        log.info("%s: auto_map names Python code in the checkpoint; it is ignored, Tuili never runs it", path)
    return Checkpoint(
        str(name_or_dir),
        path,
        config,
        read_json(path / "generation_config.json", optional=True),
        read_json(path / "tokenizer_config.json", optional=True),
    )


#: Files in which tools wrote a ``quantization_config`` of their own, and the method it is of.
QUANTIZED_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}


def read_config(path: Path) -> dict[str, Any]:
    """The config.json at ``path``, with the ``quantization_config`` of a file beside it where it has none itself."""
    config = read_json(path)
    if config.get("quantization_config") is not None:
        return config
    for name, method in QUANTIZED_BESIDE.items():
        if settings := read_json(path.with_name(name), optional=True):
            if method == "modelopt":
                settings = Fields(settings, name).table("quantization")
            return config | {"quantization_config": {"quant_method": method} | settings}
    return config


def locate(name: str, revision: str | None = None) -> Path:
    """The directory of ``name`` on this machine, fetching it from the hub if need be."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelError(f"{path} is a file; give the directory that holds it and config.json")
    if name in EMBEDDED:
        return _embedded(name)
    if not HUB_ID.fullmatch(name):
        raise ModelError(f"there is no directory {name!r}, and it is no hub id (owner/name) or {' or '.join(EMBEDDED)}")
    return _from_hub(name, revision)


def _embedded(name: str) -> Path:
    path = Path(tuili.__file__).parent / EMBEDDED[name]
    if not path.is_dir():
        raise ModelError(f"model {name!r} is not in this installation ({path} is missing); install Tuili again")
    return path


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(name, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_SKIP)
    except Exception as error:  # the hub client raises its own, httpx's and the system's errors, by version
        at = f" at revision {revision!r}" if revision else ""
        why = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
        raise ModelError(
            f"there is no directory {name!r}, and the Hugging Face hub did not give it{at} ({why}). Give a local "
            "directory, set HF_HOME to a cache that has it, set HF_TOKEN if the model is gated, or use 'embedded', "
            "which needs no network."
        ) from error
    return Path(found)
