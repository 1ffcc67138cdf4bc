"""Which tensor of a checkpoint's files is which: all that is wrong is told at once.

No torch; what it finds is read later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuili.base.errors import ModelError
from tuili.base.log import get
from tuili.models import Family
from tuili.models.checkpoint import Checkpoint
from tuili.models.names import CACHE_SCALES, EMBEDDING, HEAD, NOT_PARAMETERS
from tuili.models.quantized.layout import SCALES
from tuili.models.shards import listed, plain_name

if TYPE_CHECKING:
    import torch

    from tuili.models.quantized.layout import Layout
    from tuili.models.weights import Destination

log = get(__name__)
#: What safetensors calls the dtypes of weights that are not rounded.
WEIGHTS = ("F32", "BF16", "F16", "F64")

Found = dict[str, tuple[Any, str]]


@dataclass(frozen=True)
class Need:
    """The shapes and the dtypes that a tensor may have."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]


Needs = dict[str, Need]
Layouts = Mapping[str, "Layout"]


def layout_of(name: str, layouts: Layouts) -> Layout | None:
    """How the files hold the tensor ``name``, where it is rounded."""
    return layouts.get(name.removesuffix(".weight")) if name.endswith(".weight") else None


def needs_of(expected: dict[str, Destination], parameters: Mapping[str, torch.Tensor], layouts: Layouts) -> Needs:
    """What the files must hold, by name, with the shapes and dtypes that each may have."""
    needs: Needs = {}
    for name, slot in expected.items():
        rest, layout = parameters[slot.parameter].shape[1:], layout_of(name, layouts)
        if layout is None:
            needs[name] = Need(((slot.rows, *rest),), WEIGHTS)
            continue
        for end, shapes in layout.tensors(slot.rows, *rest).items():
            needs[f"{name.removesuffix('.weight')}.{end}"] = Need(shapes, layout.dtypes[end])
    return needs


def optional_of(layouts: Layouts) -> dict[str, tuple[str, ...]]:
    """What may be there besides, and its dtypes."""
    return {
        f"{module}.{end}": layout.dtypes.get(end, SCALES)
        for module, layout in layouts.items()
        for end in layout.optional
    }


def match(files: list[tuple[Path, Any]], family: type[Family], needs: Needs) -> Found:
    """Tensors of ``files`` by their name in the family's table; what is known not to be a parameter is left out.

    A tied pair may have kept the name of either."""
    found: Found = {}
    tied: Found = {}
    ignored = 0
    headless = not any(name.startswith(f"{HEAD}.") for name in needs)
    for path, file in files:
        for stored in file.keys():  # noqa: SIM118 (no mapping: it has no __iter__)
            name = plain_name(stored, family.prefixes)
            if stored.endswith(NOT_PARAMETERS + CACHE_SCALES) or stored.startswith(family.ignored):
                ignored += 1
                continue
            place = tied if headless and name.startswith(f"{HEAD}.") else found
            if name in place:
                raise ModelError(f"{path}: tensor {stored!r} is there twice (in another file, or under two names)")
            place[name] = (file, stored)
    embedding, head = f"{EMBEDDING}.weight", f"{HEAD}.weight"
    if embedding not in found and head in tied:
        found[embedding] = tied.pop(head)
    if ignored + len(tied):
        what = "tied head, vision tower, buffers, ranges of the KV cache"
        log.info("%d tensors are not part of the model that runs (%s): left out", ignored + len(tied), what)
    return found


def check(needs: Needs, optional: Mapping[str, tuple[str, ...]], found: Found, checkpoint: Checkpoint) -> None:
    """ModelError listing every missing, unexpected and misshapen tensor, and those of other dtypes."""
    shaped, typed = [], []
    for name, (file, stored) in found.items():
        view, need = file.get_slice(stored), needs.get(name)
        have, dtype, dtypes = list(view.get_shape()), view.get_dtype(), need.dtypes if need else optional.get(name)
        if need and tuple(have) not in need.shapes:
            shaped.append(f"{stored} (is {have}, config.json says {list(need.shapes[0])})")
        if dtypes and dtype not in dtypes:
            typed.append(f"{stored} (is {dtype}, config.json says {' or '.join(dtypes)})")
    wrong = {
        "missing": sorted(needs.keys() - found.keys()),
        "unexpected": sorted(found[name][1] for name in found.keys() - needs.keys() - optional.keys()),
        "misshapen": sorted(shaped),
        "of another dtype": sorted(typed),
    }
    if not any(wrong.values()):
        return
    rounded = f", quantization_config: {checkpoint.spec.rounded.method}" if checkpoint.spec.rounded else ""
    parts = "; ".join(f"{len(names)} {what}: {listed(names)}" for what, names in wrong.items() if names)
    lost = " Or has config.json lost its quantization_config?" if typed and not rounded else ""
    raise ModelError(
        f"the tensors of {checkpoint.path} do not fit config.json ({checkpoint.spec.family}{rounded}). {parts}. Check "
        f"that config.json belongs to these weights and that the download is complete.{lost}"
    )
