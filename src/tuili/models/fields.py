"""Reading config.json with care: every value is checked, and a bad one is named in the ModelError. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tuili.base.errors import ModelError, nearest

#: What transformers calls an activation, and what ``ops.gated`` calls it. "gelu_new" is the tanh formula written out.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
DTYPES = ("float32", "bfloat16", "float16")


class Fields:
    """A config.json (or a table in it). ``null`` counts as absent; a value without default must be there.

    ``defaults`` are the family's own, for keys that its files leave out.
    """

    def __init__(
        self, config: Mapping[str, Any], where: str = "config.json", defaults: Mapping[str, Any] | None = None
    ):
        missing = {k: v for k, v in (defaults or {}).items() if config.get(k) is None}
        self.config = {**config, **missing}
        self.where = where

    def wrong(self, key: str, expected: str) -> ModelError:
        """The error to raise when ``key``'s value is not ``expected``."""
        return ModelError(f"{self.where}: {key}={self.config.get(key)!r} is not supported: expected {expected}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.config.get(key)
        value = default if value is None else value
        if value is None:
            raise ModelError(f"{self.where} has no {key!r}; the checkpoint is incomplete or of another family")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(key, "a whole number of at least 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise self.wrong(key, "a number above 0")
        return float(value)

    def maybe(self, key: str, default: float | None = None) -> float | None:
        """A number, or None where the file says null; ``default`` where it says nothing."""
        if key in self.config and self.config[key] is None:
            return None
        return default if key not in self.config else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def table(self, key: str) -> dict[str, Any]:
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self.wrong(key, "a table")
        return value

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        value = self._get(key, None)
        if not isinstance(value, list) or len(value) != count or not all(_positive(v) for v in value):
            raise self.wrong(key, f"a list of {count} numbers above 0")
        return tuple(float(v) for v in value)

    def strings(self, key: str) -> list[str]:
        """A list of strings, or nothing."""
        value = self.config.get(key)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self.wrong(key, "a list of names")
        return value

    def activation(self, *keys: str, default: str = "silu") -> str:
        """The activation under the first of ``keys`` that is there, in ``ops.gated``'s words."""
        key = next((k for k in keys if self.config.get(k) is not None), keys[0])
        value = self._get(key, default)
        if value not in ACTIVATIONS:
            raise ModelError(f"{self.where}: {key}={value!r} is not supported.{nearest(str(value), ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def dtype(self) -> str:
        """The checkpoint's own dtype: ``dtype`` since transformers 5, ``torch_dtype`` before; float32 where absent."""
        key = "dtype" if self.config.get("dtype") is not None else "torch_dtype"
        value = str(self._get(key, "float32")).removeprefix("torch.")
        if value not in DTYPES:
            raise ModelError(f"{self.where}: {key}={value!r} is not supported.{nearest(value, DTYPES)}")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id, a list of ids, or nothing."""
        value = self.config.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self.wrong(key, "a token id or a list of token ids")
        return tuple(ids)

    def refuse(self, key: str, why: str) -> None:
        """ModelError when ``key`` is set: half a feature would give wrong text in silence."""
        if self.config.get(key):
            raise ModelError(f"{self.where}: {key}={self.config[key]!r} is not supported: {why}")


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
