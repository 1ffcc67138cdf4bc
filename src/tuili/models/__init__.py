"""Floor 4: one file per architecture, found by scanning this folder."""

from __future__ import annotations

from tuili.base.registry import Registry
from tuili.layers.decoder import Decoder

#: By the names in config.json's ``architectures``.
families: Registry[type[Decoder]] = Registry("model architecture", "tuili.models")
