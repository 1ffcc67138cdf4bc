"""Rules for logits: what a request's own wishes do to its scores before a token is chosen. One file each, found by
scanning this folder; applied in the order of interfaces.md 5.1."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Protocol

import torch

from tuili.base.registry import Registry
from tuili.core.params import SamplingParams

if TYPE_CHECKING:
    from tuili.runtime.rows import Row


class Rule(Protocol):
    """One kind of wish. A rule has no state: what it remembers of a request is in its ``Row.notes``.

    ``order``: rules of lower numbers are applied first. ``reads_tokens``: it looks at ``Row.tokens``, so the host must
    know all ids before a step. An exception out of ``applies`` or ``apply`` ends that request alone (law 6).
    """

    order: int
    reads_tokens: bool

    def wants(self, params: SamplingParams) -> bool:
        """Whether requests with ``params`` ask for it; decided once per request."""
        ...

    def applies(self, row: Row, position: int) -> bool:
        """Whether it changes anything for the token that will stand at ``position``."""
        ...

    def apply(self, scores: torch.Tensor, row: Row, position: int) -> None:
        """Change ``scores`` [vocab], float32, in place."""
        ...


rules: Registry[type[Rule]] = Registry("rule for logits", "tuili.runtime.rules")


@cache
def ordered_rules() -> tuple[Rule, ...]:
    """One of each, in the order in which they are applied."""
    return tuple(sorted((rules.get(name)() for name in rules), key=lambda rule: rule.order))


def rules_of(params: SamplingParams) -> tuple[Rule, ...]:
    """The rules that ``params`` ask for, in order."""
    return tuple(rule for rule in ordered_rules() if rule.wants(params))
