"""Floor 4: one file per architecture, found by scanning this folder. A family is data: parsing and names, no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from tuili.base.errors import ConfigError, ModelError
from tuili.base.registry import Registry
from tuili.layers.spec import ModelSpec
from tuili.models.names import Names


class Family(ABC):
    """What differs between architectures: how config.json reads, and what the checkpoint calls its tensors."""

    #: The checkpoint's module names to ours (see ``names.py``).
    names: ClassVar[Names]
    #: Other beginnings that the checkpoint's names may have, and what they stand for in ``names``.
    prefixes: ClassVar[Mapping[str, str]] = {}
    #: Beginnings of names that belong to parts we do not run (a vision tower).
    ignored: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    @abstractmethod
    def parse(config: dict[str, Any]) -> ModelSpec:
        """The decoder that ``config`` (config.json) describes. Raises ModelError naming key and value."""


#: By the names in config.json's ``architectures``.
families: Registry[type[Family]] = Registry("model architecture", "tuili.models")


def family_of(config: Mapping[str, Any]) -> type[Family]:
    """The family that config.json's ``architectures`` names; ModelError with the nearest known name otherwise."""
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise ModelError(
            f"config.json: architectures={named!r} names no architecture; it must be a list such as "
            f"['LlamaForCausalLM']. Known: {', '.join(families.names())}."
        )
    try:
        return families.get(named[0])
    except ConfigError as error:
        raise ModelError(f"config.json: architectures={named!r}: {error}") from error
