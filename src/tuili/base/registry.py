"""Plugins found by scanning a folder: adding one thing adds one file (DESIGN.md 5)."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from tuili.base.errors import ConfigError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to plugins of one kind, filled by ``@registry.register("name")`` in the modules of ``package``.

    The package is imported on first look-up. A module that fails to import does not hide the others:
    it is named in the error that an unknown name raises.
    """

    def __init__(self, kind: str, package: str):
        self.kind = kind
        self.package = package
        self._items: dict[str, T] = {}
        self._broken: dict[str, str] = {}
        self._scanned = False

    def register(self, *names: str) -> Callable[[T], T]:
        def add(item: T) -> T:
            for name in names:
                if name in self._items and self._items[name] is not item:
                    raise ConfigError(f"{self.kind} {name!r} is registered twice, the second time by {item!r}")
                self._items[name] = item
            return item

        return add

    def scan(self) -> None:
        if self._scanned:
            return
        self._scanned = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            name = f"{self.package}.{module.name}"
            try:
                importlib.import_module(name)
            except Exception as error:  # a broken plugin must not take the others with it
                self._broken[name] = f"{type(error).__name__}: {error}"

    def get(self, name: str) -> T:
        """The plugin called ``name``; ConfigError names the nearest one and any broken module."""
        self.scan()
        if name in self._items:
            return self._items[name]
        broken = "".join(f" Module {m} failed to import ({why})." for m, why in self._broken.items())
        raise ConfigError(f"unknown {self.kind} {name!r}.{nearest(name, self._items)}{broken}")

    def names(self) -> list[str]:
        self.scan()
        return sorted(self._items)

    def broken(self) -> dict[str, str]:
        self.scan()
        return dict(self._broken)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        self.scan()
        return name in self._items
