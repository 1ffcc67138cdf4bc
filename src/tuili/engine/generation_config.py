"""Defaults of sampling that a model brings along, and where each came from (interfaces.md 5.4). No torch.

Precedence: the user's value, ``override_generation_config``, generation_config.json, the neutral default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuili.base.config import Config
from tuili.base.errors import ConfigError, RequestError
from tuili.base.log import get
from tuili.core.params import SamplingParams

log = get(__name__)
FILE = "generation_config.json"
NEUTRAL: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "skip_special_tokens": True,
    "max_new_tokens": None,
}


@dataclass(frozen=True)
class GenerationDefaults:
    """``values`` has every key of ``NEUTRAL``; ``sources`` says for each where its value was read."""

    values: dict[str, Any] = field(default_factory=lambda: dict(NEUTRAL))
    sources: dict[str, str] = field(default_factory=lambda: dict.fromkeys(NEUTRAL, "neutral"))

    @property
    def max_new_tokens(self) -> int | None:
        return self.values["max_new_tokens"]

    def sampling(self) -> dict[str, Any]:
        """Keyword arguments of SamplingParams; ``max_tokens`` only where the model limits it."""
        values = {key: value for key, value in self.values.items() if key != "max_new_tokens"}
        return values if self.max_new_tokens is None else {**values, "max_tokens": self.max_new_tokens}


def generation_defaults(config: Config, files: Mapping[str, Any]) -> GenerationDefaults:
    """``files`` is the checkpoint's generation_config.json. ConfigError for values that sampling cannot take.

    Its end-of-text ids are not read here: they belong to the model (``ModelSpec``), not to taste.
    """
    values, sources = dict(NEUTRAL), dict.fromkeys(NEUTRAL, "neutral")
    for source, chosen in _layers(config, files):
        for key, value in chosen.items():
            if value is not None:
                values[key], sources[key] = value, source
    defaults = GenerationDefaults(values, sources)
    _check(defaults)
    changed = {k: f"{v} ({sources[k]})" for k, v in values.items() if v != NEUTRAL[k]}
    if changed:
        listed = ", ".join(f"{key}={value}" for key, value in changed.items())
        log.warning(
            "sampling defaults changed by the model: %s; --generation-config vllm keeps the neutral ones", listed
        )
    return defaults


def _layers(config: Config, files: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Weakest first."""
    layers = []
    if config.generation_config == "auto":
        layers.append((FILE, _known(files)))
    elif config.generation_config != "vllm":
        path = Path(config.generation_config) / FILE
        layers.append((str(path), _known(_read(path))))
    if config.override_generation_config is not None:
        layers.append(
            ("--override-generation-config", _known(_override(config.override_generation_config), strict=True))
        )
    return layers


def _known(written: Mapping[str, Any], strict: bool = False) -> dict[str, Any]:
    """The keys that sampling honours; ``do_sample: false`` is temperature 0, as transformers means it."""
    unknown = set(written) - set(NEUTRAL) - {"do_sample"}
    if strict and unknown:
        known = ", ".join([*NEUTRAL, "do_sample"])
        raise ConfigError(f"--override-generation-config has unknown keys {sorted(unknown)}. Known: {known}.")
    chosen = {key: written[key] for key in NEUTRAL if key in written}
    if written.get("do_sample") is False:
        chosen["temperature"] = 0.0
    return chosen


def _override(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--override-generation-config is not JSON ({error}): {text!r}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"--override-generation-config must be a JSON object, got {text!r}")
    return value


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--generation-config: cannot read {path} ({error}); give 'auto', 'vllm' or a directory that holds {FILE}"
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return value


def _check(defaults: GenerationDefaults) -> None:
    try:
        SamplingParams(**defaults.sampling())
    except RequestError as error:
        source = defaults.sources.get(error.param or "", FILE)
        raise ConfigError(f"{source}: {error}; correct it with --override-generation-config") from error
