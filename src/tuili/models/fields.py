"""Reading config.json with care: every value is checked, and a bad one is named in the ModelError. No torch."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping
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
#: No model comes near these, and none may be taken apart whose shapes would never end or fit a 64-bit size.
MOST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 2048,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
}
MOST_INTEGER, LEAST_NUMBER, MOST_NUMBER = (1 << 31) - 1, 1e-12, 1e12
#: Entries of a list of names, and of token ids.
MOST_NAMES, MOST_IDS = 20_000, 256


def shown(value: Any) -> str:
    """``value`` for a message: what a file says may be long, or nested deeply."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = 120
    return brief.repr(value)


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
        return ModelError(f"{self.where}: {key}={shown(self.config.get(key))} is not supported: expected {expected}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.config.get(key)
        value = default if value is None else value
        if value is None:
            raise ModelError(f"{self.where} has no {key!r}; the checkpoint is incomplete or of another family")
        return value

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self._get(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        most = MOST.get(key, MOST_INTEGER)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.wrong(key, f"a whole number of at least {least} and at most {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if not _positive(value):
            raise self.wrong(key, f"a number of at least {LEAST_NUMBER:g} and at most {MOST_NUMBER:g}")
        return float(value)

    def maybe(self, key: str, default: float | None = None) -> float | None:
        """A number, or None where the file says null; ``default`` where it says nothing."""
        if key in self.config and self.config[key] is None:
            return None
        return default if key not in self.config else self.number(key)

    def maybe_integer(self, key: str, default: int | None = None) -> int | None:
        """As ``maybe``, a whole number."""
        if key in self.config and self.config[key] is None:
            return None
        return default if key not in self.config else self.integer(key)

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a name")
        return value

    def choice(self, key: str, known: Collection[str], default: str | None = None) -> str:
        """One of the names ``known``."""
        return self._known(key, self._get(key, default), known)

    def _known(self, key: str, value: Any, known: Collection[str]) -> str:
        if not isinstance(value, str) or value not in known:
            near = nearest(value[:80] if isinstance(value, str) else "", known)
            raise ModelError(f"{self.where}: {key}={shown(value)} is not supported.{near}")
        return value

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

    def inside(self, key: str) -> Fields:
        """The table under ``key``, to be read in its turn; an empty one where there is none."""
        return Fields(
            self.table(key), f"{self.where}: {key}" if self.where.endswith(".json") else f"{self.where}.{key}"
        )

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
        if len(value) > MOST_NAMES:
            raise ModelError(f"{self.where}: {key} has {len(value)} names, and at most {MOST_NAMES} are read")
        return value

    def activation(self, key: str, default: str = "silu") -> str:
        """The activation under ``key``, in ``ops.gated``'s words."""
        return ACTIVATIONS[self._known(key, self._get(key, default), ACTIVATIONS)]

    def dtype(self) -> str:
        """The checkpoint's own dtype: ``dtype`` since transformers 5, ``torch_dtype`` before; float32 where absent."""
        key = "dtype" if self.config.get("dtype") is not None else "torch_dtype"
        return self._known(key, self.text(key, "float32").removeprefix("torch."), DTYPES)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id, a list of ids, or nothing."""
        value = self.config.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if len(ids) > MOST_IDS or not all(type(i) is int and 0 <= i <= MOST_INTEGER for i in ids):
            raise self.wrong(key, f"a token id or a list of at most {MOST_IDS} token ids")
        return tuple(ids)

    def refuse(self, key: str, why: str) -> None:
        """ModelError when ``key`` is set: half a feature would give wrong text in silence."""
        if self.config.get(key):
            raise ModelError(f"{self.where}: {key}={shown(self.config[key])} is not supported: {why}")


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and LEAST_NUMBER <= value <= MOST_NUMBER
