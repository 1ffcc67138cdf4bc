"""Arms: a rival at a width. Which were asked for, which can run here, and which run side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rivals.rival import RIVALS, Places, Rival, Unavailable, Width, rival


@dataclass(frozen=True)
class Arm:
    module: str
    rival: Rival
    width: Width

    @property
    def name(self) -> str:
        return f"{self.rival.name} {self.width.name}"

    def command(self, model: Path, places: Places, threads: int) -> tuple[list[str], dict[str, str]]:
        """How its worker is started, and with which environment variables."""
        python, env = self.rival.launch(places, threads)
        worker = str(Path(__file__).with_name("worker.py"))
        return [str(python), worker, self.module, self.width.name, str(model), str(threads)], env


def arms(wanted: Sequence[str]) -> list[Arm]:
    """Those whose name begins with one of ``wanted`` ("tuili", "openvino int4"); all where nothing is wanted.

    ValueError for a word that names none.
    """
    found = [Arm(module, engine, width) for module in RIVALS for engine in [rival(module)] for width in engine.widths]
    for word in wanted:
        if not any(arm.name.startswith(word) for arm in found):
            raise ValueError(f"no arm is called {word!r}; there are: {', '.join(arm.name for arm in found)}")
    return [arm for arm in found if not wanted or arm.name.startswith(tuple(wanted))]


def installed(chosen: Sequence[Arm], places: Places) -> dict[str, dict[str, str] | Unavailable]:
    """Versions by module of rival, or why it cannot be had."""
    found: dict[str, dict[str, str] | Unavailable] = {}
    for arm in chosen:
        if arm.module not in found:
            try:
                found[arm.module] = arm.rival.install(places)
            except Unavailable as error:
                found[arm.module] = error
    return found


def side_by_side(chosen: Sequence[Arm]) -> list[list[Arm]]:
    """Arms of one group of widths take turns; all of them are loaded at once, so that groups bound the memory."""
    groups = dict.fromkeys(arm.width.group for arm in chosen)
    return [[arm for arm in chosen if arm.width.group == group] for group in groups]
