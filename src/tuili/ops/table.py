"""The op table: an op is a torch reference (its meaning), sample inputs and a tolerance, declared together.

Other implementations register with ``implement`` and are held to the reference, on every sample, by one test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

from tuili.base.errors import ConfigError, nearest

P = ParamSpec("P")
R = TypeVar("R")


class Backend(Protocol):
    """Whose ops a fused one's parts are: ``Kernels``."""

    def __getattr__(self, name: str) -> Callable[..., Any]: ...


@dataclass(frozen=True)
class Sample:
    """Arguments of one call, made fresh by ``make(generator)``; ``name`` says what is special about it."""

    name: str
    make: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(eq=False)
class Op(Generic[P, R]):
    """An op of the table. Calling it runs the ``reference``, which is its meaning; ``Kernels`` run implementations.

    A fused op has ``parts(kernels, ...)``: the ops that it is made of, called one after the other, for backends that
    have only those.
    """

    name: str
    reference: Callable[P, R]
    samples: Callable[[], list[Sample]]
    tolerance: float
    parts: Callable[..., Any] | None = None
    implementations: dict[str, Callable[P, R]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.implementations["reference"] = self.reference
        self.__doc__ = self.reference.__doc__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.reference(*args, **kwargs)


table: dict[str, Op[..., Any]] = {}


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
    """Register another implementation of op ``name``: the one of ``Kernels`` called ``backend``."""

    def add(function: Callable[P, R]) -> Callable[P, R]:
        if name not in table:
            raise ConfigError(f"unknown op {name!r}.{nearest(name, table)}")
        table[name].implementations[backend] = function
        return function

    return add
