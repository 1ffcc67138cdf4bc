"""The op table: an op is a torch reference (its meaning), sample inputs and a tolerance, declared together.

Other implementations register with ``implement`` and are held to the reference, on every sample, by one test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeVar

from torch.compiler import is_compiling

from tuili.base.errors import ConfigError, nearest

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Sample:
    """Arguments of one call, made fresh by ``make(generator)``; ``name`` says what is special about it."""

    name: str
    make: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass
class Op(Generic[P, R]):
    """An op of the table. Calling it runs the active implementation; ``reference`` is its meaning.

    A fused op has ``parts``: the ops that it is made of, called one after the other, for backends that have only those.
    While torch.compile traces a caller, ``traced`` stands for the op (``ops.compiled``).
    """

    name: str
    reference: Callable[P, R]
    samples: Callable[[], list[Sample]]
    tolerance: float
    parts: Callable[..., Any] | None = None
    implementations: dict[str, Callable[P, R]] = field(default_factory=dict)
    active: Callable[P, R] = field(init=False)
    traced: Callable[P, R] | None = None

    def __post_init__(self) -> None:
        self.implementations["reference"] = self.reference
        self.active = self.reference
        self.__doc__ = self.reference.__doc__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self.traced is not None and is_compiling():
            return self.traced(*args, **kwargs)
        return self.active(*args, **kwargs)


table: dict[str, Op[..., Any]] = {}
_active = "reference"


def op(
    samples: Callable[[], list[Sample]], tolerance: float = 0.0, parts: Callable[..., Any] | None = None
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Declare a reference as an op. ``tolerance`` is the largest relative error of other implementations; ``parts``
    calls the ops that a fused one is made of."""

    def declare(reference: Callable[P, R]) -> Op[P, R]:
        entry = Op(reference.__name__, reference, samples, tolerance, parts)
        table[entry.name] = entry
        return entry

    return declare


def implement(name: str, backend: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register another implementation of op ``name``; ``use(backend)`` makes it active."""

    def add(function: Callable[P, R]) -> Callable[P, R]:
        if name not in table:
            raise ConfigError(f"unknown op {name!r}.{nearest(name, table)}")
        table[name].implementations[backend] = function
        return function

    return add


def choose(backend: str) -> None:
    """As ``use``, until something else is chosen. ConfigError for a backend that no op has."""
    known = {b for entry in table.values() for b in entry.implementations}
    if backend not in known:
        raise ConfigError(f"unknown op backend {backend!r}.{nearest(backend, known)}")
    global _active
    _active = backend
    for entry in table.values():
        entry.active = entry.implementations.get(backend, entry.parts or entry.reference)


def active_backend() -> str:
    """What was chosen last."""
    return _active


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Run on ``backend`` where an op has it, else on the reference. Bug hunts start with ``use("reference")``."""
    global _active
    before = {name: entry.active for name, entry in table.items()}
    chosen = _active
    choose(backend)
    try:
        yield
    finally:
        _active = chosen
        for name, active in before.items():
            table[name].active = active
