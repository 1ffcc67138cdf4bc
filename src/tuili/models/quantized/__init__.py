"""Checkpoints that are quantized already: ``quantization_config`` of config.json, read into a ``Layout`` per module.

One file per method, found by scanning this folder; torch only where weights are read. Nothing is rounded again: the
codes of the files are the codes that are computed with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any, Protocol

from tuili.base.errors import ConfigError, ModelError
from tuili.base.registry import Registry
from tuili.layers.shapes import projections
from tuili.layers.sizes import parameters
from tuili.layers.spec import ModelSpec, Rounded
from tuili.models import Family, family_of
from tuili.models.fields import shown
from tuili.models.names import expand
from tuili.models.quantized.layout import Layout
from tuili.quant.scheme import Scheme


class Method(Protocol):
    """One quantization method, as a ``quantization_config`` sets it."""

    def __init__(self, config: Mapping[str, Any]):
        """``config`` is that table. ModelError naming key and value for what is not supported."""

    def layout(self, names: tuple[str, ...], kind: str) -> Layout | None:
        """How the files hold the matrix of the module that goes by ``names``; None: as floats.

        ``kind`` is its class in PyTorch, Linear or Embedding.
        """


#: By the names in ``quant_method``.
methods: Registry[type[Method]] = Registry("quantization method", "tuili.models.quantized")


def spec_of(config: Mapping[str, Any]) -> ModelSpec:
    """The decoder that config.json describes, with what its ``quantization_config`` makes of the matrices."""
    family = family_of(config)
    spec = family.parse(dict(config))
    found = layouts_of(config, family, spec)
    return replace(spec, rounded=_rounded(config, family, spec, found)) if found else spec


def layouts_of(config: Mapping[str, Any], family: type[Family], spec: ModelSpec) -> dict[str, Layout]:
    """How the files hold the matrices that are rounded, by the checkpoint's names of their modules."""
    settings = _settings(config)
    if settings is None:
        return {}
    named = settings.get("quant_method")
    try:
        method = methods.get(named if isinstance(named, str) else shown(named))(settings)
    except ConfigError as error:
        raise ModelError(f"config.json: quantization_config: quant_method={shown(named)}: {error}") from error
    found = {}
    for module, ours, _ in _matrices(family, spec):
        names = (module, *_aliases(module, family.prefixes))
        layout = method.layout(names, "Embedding" if ours == "embedding" else "Linear")
        if layout is not None:
            found[module] = layout
    return found


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    settings = config.get("quantization_config") or config.get("compression_config")
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        raise ModelError(f"config.json: quantization_config={shown(settings)} must be a table")
    # ModelOpt may write its own name as the producer's only.
    return {"quant_method": "modelopt", **settings} if "quant_algo" in settings else settings


def _aliases(module: str, prefixes: Mapping[str, str]) -> Iterator[str]:
    """Other names of a module that a checkpoint of the family may use."""
    for prefix, plain in prefixes.items():
        if module.startswith(plain):
            yield prefix + module.removeprefix(plain)


def _matrices(family: type[Family], spec: ModelSpec) -> Iterator[tuple[str, str, int | None]]:
    """The checkpoint's module, ours, and which part of ours it is, of every matrix of the model."""
    shapes = parameters(spec)
    for theirs, ours, part in expand(family.names, spec.num_layers):
        if len(shapes.get(f"{ours}.weight", ())) == 2:
            yield theirs, ours, part


def _rounded(config: Mapping[str, Any], family: type[Family], spec: ModelSpec, found: dict[str, Layout]) -> Rounded:
    """What our matrices become. ModelError where one is made of parts that do not go together."""
    members: dict[str, dict[str, Scheme]] = {}
    for module, ours, _ in _matrices(family, spec):
        members.setdefault(ours, {})[module] = found[module].scheme if module in found else Scheme()
    schemes = []
    for ours, each in members.items():
        scheme, *others = each.values()
        if any(other != scheme for other in others):
            held = ", ".join(f"{module} {scheme}" for module, scheme in each.items())
            raise ModelError(
                f"config.json: quantization_config: {ours} is one matrix here, and the checkpoint's parts of it are "
                f"held in different ways ({held}); quantize them alike"
            )
        parts = projections(spec)[ours.split(".", 2)[2]].parts if others else ()
        ends = list(accumulate(parts))[:-1]
        if any(end % scheme.height for end in ends):
            scheme = replace(scheme, height=1)  # blocks that begin anew in each part: their scales output by output
        if scheme != Scheme():
            schemes.append((ours, scheme))
    return Rounded(str((_settings(config) or {}).get("quant_method")), tuple(schemes))
