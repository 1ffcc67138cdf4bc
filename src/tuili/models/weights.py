"""Weights from a Hugging Face directory into a ``Decoder``, and back to their names. Safetensors only, never pickles.

Torch is imported by the functions, not by the module: scanning this folder for families must work without it.
Files are memory-mapped and stored slice by slice in what is made once, rounded on the way where the scheme says so, so
that memory peaks at the model's own size. Everything wrong with the set of tensors is reported together, before any
weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tuili.base.errors import ConfigError, ModelError, nearest
from tuili.base.log import get
from tuili.layers.spec import refuse_rounding_twice
from tuili.models import families, make_decoder
from tuili.models.checkpoint import Checkpoint
from tuili.models.fields import DTYPES
from tuili.models.files import (
    Found,
    Layouts,
    Needs,
    check,
    layout_of,
    match,
    needs_of,
    optional_of,
)
from tuili.models.names import Names, expand
from tuili.models.shards import open_file, weight_files

if TYPE_CHECKING:
    import torch

    from tuili.layers.decoder import Decoder
    from tuili.models.source import CodedPart, FloatPart
    from tuili.ops import Kernels
    from tuili.quant.codes import Codes
    from tuili.quant.place import Place
    from tuili.quant.scheme import Scheme
    from tuili.quant.weight import Weight

log = get(__name__)

#: Called with a parameter's name, the bytes loaded so far and the bytes in all (counted in the model's dtype).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Destination:
    """Where a checkpoint's tensor goes: rows ``start .. start + rows`` of one of our parameters."""

    parameter: str
    start: int
    rows: int


def load_model(
    checkpoint: Checkpoint,
    dtype: str,
    max_model_len: int,
    progress: Progress | None = None,
    scheme: Scheme | None = None,
    device: str | torch.device = "cpu",
    kernels: Kernels | None = None,
) -> Decoder:
    """The checkpoint's model, activations in ``dtype`` (of ``fields.DTYPES``), ready for ``max_model_len`` tokens.

    ``scheme``: how its matrices are stored; None: as plain parameters. Those that the checkpoint holds rounded are
    stored as they are. ``device``: where to, in the order of the ``kernels`` that compute (None: the references).
    Evaluation mode, no gradients. Raises ModelError, and ConfigError for an unknown ``dtype`` or a ``scheme`` that
    would round what is rounded.
    """
    import torch

    from tuili.layers.build import Build
    from tuili.ops import REFERENCE
    from tuili.quant.place import place_on

    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}.{nearest(dtype, DTYPES)}")
    spec = checkpoint.spec
    if scheme is not None:
        refuse_rounding_twice(scheme.format, spec)
    with torch.device("meta"):
        model = make_decoder(spec, Build(kernels or REFERENCE))
    place = place_on(device, model.kernels)
    load_weights(model, checkpoint, getattr(torch, dtype), place, progress, scheme)
    model.requires_grad_(False).eval()
    if spec.rope.kind in ("dynamic", "longrope") and max_model_len > spec.rope.original_len:
        log.info(
            "%s: rope %r is stretched for max_model_len %d; up to %d it is not, which is more exact on short texts",
            *(checkpoint.name, spec.rope.kind, max_model_len, spec.rope.original_len),
        )
    _tell(model, place.packing)
    model.prepare(max_model_len)
    return model


def _tell(model: Decoder, packing: str) -> None:
    """Log what runs otherwise than its name says."""
    stored = [weight for module in model.modules() if (weight := _stored(module)) is not None]
    slow = {w.scheme.format for w in stored if packing not in w.format.fast or w.scheme.wide_scales}
    if packing == "cpu" and slow:
        log.warning("%s weights like these run on torch's references on a CPU: exact and slow", "/".join(sorted(slow)))
    if packing != "cpu" and any(w.scheme.format == "int4" and not w.scheme.weight_only for w in stored):
        log.info("int4 weights: on a device activations are not rounded (W4A16)")


def load_weights(
    model: Decoder,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    place: Place,
    progress: Progress | None = None,
    scheme: Scheme | None = None,
) -> None:
    """Fill ``model`` (on meta) from the checkpoint's ``*.safetensors``. ModelError lists all that is wrong."""
    expected, parameters = destinations(model, checkpoint.family.names), dict(model.named_parameters())
    with ExitStack() as stack:
        files = [(path, stack.enter_context(open_file(path))) for path in weight_files(checkpoint.path)]
        needs = needs_of(expected, parameters, checkpoint.layouts)
        found = match(files, checkpoint.family, needs)
        check(needs, optional_of(checkpoint.layouts), found, checkpoint)
        members: dict[str, list[str]] = {}
        for name in sorted(expected, key=lambda name: expected[name].start):
            members.setdefault(expected[name].parameter, []).append(name)
        total, done = sum(parameter.numel() for parameter in parameters.values()) * dtype.itemsize, 0
        for target, parameter in parameters.items():
            wanted = model.spec.scheme_of(target.removesuffix(".weight"), scheme)
            parts = [
                _part(name, expected[name].rows, parameter, wanted, needs, found, checkpoint.layouts)
                for name in members[target]
            ]
            slices, fill = _room(model, target, parameter, dtype, _exact(wanted, parts, target), place)
            rounding = wanted is not None and wanted.format != "dense" and parameter.dim() == 2
            for start, end, rows in _read_slices(parts, slices):
                if rounding:
                    _refuse_not_finite(rows, members[target])
                fill(start, _brought(rows, place))
                done += (end - start) * parameter[:1].numel() * dtype.itemsize
                if progress is not None:
                    progress(target, done, total)


def _read_slices(
    parts: list[FloatPart | CodedPart], slices: list[tuple[int, int]]
) -> Iterator[tuple[int, int, torch.Tensor | Codes]]:
    """The rows of each slice of ``parts`` on top of each other; those that were read are released."""
    from tuili.models.source import WeightSource

    source = WeightSource(parts)
    for start, end in slices:
        yield start, end, source.read(start, end)
        source.release(start, end)


def _refuse_not_finite(rows: torch.Tensor | Codes, names: list[str]) -> None:
    """ModelError for floats that no code can stand for: one would spoil the scale of all that share it."""
    import torch

    if isinstance(rows, torch.Tensor) and not all(math.isfinite(float(end)) for end in torch.aminmax(rows)):
        raise ModelError(
            f"{' or '.join(names)} has weights that are NaN or infinite, which cannot be rounded; the checkpoint is "
            "damaged, or its training went wrong (without --quantization it loads, and answers nonsense)"
        )


Fill = Callable[[int, "torch.Tensor | Codes"], object]


def _room(
    model: Decoder, name: str, meta: torch.Tensor, dtype: torch.dtype, scheme: Scheme | None, place: Place
) -> tuple[list[tuple[int, int]], Fill]:
    """Make the real tensor of parameter ``name``, which is on ``meta``.

    The slices in which it wants its rows, and what takes them.
    """
    import torch

    from tuili.layers.linear import Matrix
    from tuili.quant.weight import Weight, slices

    path, kind = name.rsplit(".", 1)
    module = model.get_submodule(path)
    if scheme is not None and kind == "weight" and isinstance(module, Matrix):
        out, into = meta.shape
        weight = Weight.empty(out, into, scheme, dtype, place)
        module.hold(weight)
        return weight.slices(), weight.fill
    plain = torch.empty(meta.shape, dtype=dtype, device=place.device)
    module.register_parameter(kind, torch.nn.Parameter(plain))
    return slices(len(plain), plain[:1].numel()), lambda start, rows: plain[start : start + len(rows)].copy_(rows)


def _exact(scheme: Scheme | None, parts: list[FloatPart | CodedPart], name: str) -> Scheme | None:
    """``scheme``; with scales of float32 where float16 would change one of the files'."""
    if scheme is None or scheme.format != "int4":
        return scheme
    changed = [scales for part in parts if part.layout and bool(((scales := part.scales()).half() != scales).any())]
    if not changed:
        return scheme
    smallest = min(float(scales.abs().min()) for scales in changed)
    log.warning("%s: scales (down to %.1e) would not be the same in float16; they are kept in float32", name, smallest)
    return replace(scheme, wide_scales=True)


def _brought(rows: torch.Tensor | Codes, place: Place) -> torch.Tensor | Codes:
    from tuili.quant.codes import Codes

    return rows.each(place.bring) if isinstance(rows, Codes) else place.bring(rows)


def _part(
    name: str, rows: int, parameter: torch.Tensor, scheme: Scheme | None, needs: Needs, found: Found, layouts: Layouts
) -> FloatPart | CodedPart:
    """The tensor called ``name`` in the files, or what the files hold in its stead."""
    from tuili.models.source import CodedPart, FloatPart

    layout, module = layout_of(name, layouts), name.removesuffix(".weight")
    if layout is None or scheme is None:
        return FloatPart(_read(found[name]))
    into = parameter.shape[1]
    ends = layout.tensors(rows, into).keys() | {end for end in layout.optional if f"{module}.{end}" not in needs}
    files = {end: _read(found[f"{module}.{end}"]) for end in ends if f"{module}.{end}" in found}
    layout.check(module, files, rows, into)
    return CodedPart(module, layout, files, scheme, rows, into)


def _read(place: tuple[Any, str]) -> torch.Tensor:
    file, stored = place
    tensor: torch.Tensor = file.get_tensor(stored)
    return tensor


def to_hf(model: Decoder, family: str | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors under the names of a Hugging Face checkpoint, to be saved or copied.

    Views of parameters; matrices that are stored in a format come as what they mean (of a rounded one: the rounded
    numbers), made one at a time. ``family`` is an architecture's name; by default the spec's own.
    """
    for name, slot in destinations(model, families.get(family or model.spec.family).names).items():
        path, kind = slot.parameter.rsplit(".", 1)
        module = model.get_submodule(path)
        stored = _stored(module) if kind == "weight" else None
        tensor = getattr(module, kind).data if stored is None else stored.dequant()
        yield name, tensor[slot.start : slot.start + slot.rows]


def _stored(module: Any) -> Weight | None:
    """The weight of a matrix that is stored in a format."""
    found: Weight | None = getattr(module, "stored", None)
    return found


def destinations(model: Decoder, names: Names) -> dict[str, Destination]:
    """Every tensor that a checkpoint of ``model`` has, by its name there, and where it goes: the table, walked."""
    modules = dict(model.named_modules())
    walked: dict[str, Destination] = {}
    for theirs, ours, part in expand(names, model.spec.num_layers):
        module = modules.get(ours)
        for kind, length in _lengths(module):
            start, rows = _rows(module, part, length)
            walked[f"{theirs}.{kind}"] = Destination(f"{ours}.{kind}", start, rows)
    uncovered = dict(model.named_parameters()).keys() - {slot.parameter for slot in walked.values()}
    assert not uncovered, f"the table of names leaves out {sorted(uncovered)}"
    return walked


def _lengths(module: Any) -> Iterator[tuple[str, int]]:
    """The tensors of a module itself, parameters or stored in a format, and how many rows each has."""
    if module is not None and (stored := _stored(module)) is not None:
        yield "weight", stored.out
    for kind, value in module.named_parameters(recurse=False) if module is not None else ():
        yield kind, len(value)


def _rows(module: Any, part: int | None, rows: int) -> tuple[int, int]:
    """First row and row count of the ``part``-th projection fused in ``module`` (None: all of it)."""
    if part is None:
        return 0, rows
    return sum(module.parts[:part]), module.parts[part]
