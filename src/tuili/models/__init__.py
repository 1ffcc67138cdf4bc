"""Floor 4: one file per architecture, found by scanning this folder. A family is data: parsing and names, no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from tuili.base.errors import ConfigError, ModelError
from tuili.base.registry import Registry
from tuili.layers.spec import ModelSpec
from tuili.models.names import Names

if TYPE_CHECKING:
    from tuili.layers.build import Build
    from tuili.layers.decoder import Block, Decoder


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

    @staticmethod
    def block(spec: ModelSpec, layer: int, build: Build) -> Block:
        """The block of one layer. A family with another structure gives a subclass of ``layers.decoder.Block``."""
        from tuili.layers.decoder import Block

        return Block(spec, layer, build)


#: By the names in config.json's ``architectures``.
families: Registry[type[Family]] = Registry("model architecture", "tuili.models")


def make_decoder(spec: ModelSpec, build: Build | None = None) -> Decoder:
    """The decoder of ``spec``, of its family's blocks, with weights that mean nothing yet."""
    from tuili.layers.build import REFERENCES
    from tuili.layers.decoder import Decoder

    return Decoder(spec, build or REFERENCES, families.get(spec.family).block)


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
