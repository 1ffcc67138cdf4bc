"""The safetensors files of a checkpoint, and which of their tensors is which: all that is wrong is told at once.

No torch; what it finds is read later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from tuili.base.errors import ModelError
from tuili.base.log import get
from tuili.models import Family
from tuili.models.checkpoint import Checkpoint, read_json
from tuili.models.names import CACHE_SCALES, NOT_PARAMETERS

if TYPE_CHECKING:
    import torch

    from tuili.models.quantized.layout import Layout
    from tuili.models.weights import Slot

log = get(__name__)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

Found = dict[str, tuple[Any, str]]
Needs = dict[str, tuple[tuple[int, ...], ...]]
Layouts = Mapping[str, "Layout"]


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the single one, those of the index, or all there are."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return _indexed(index)
    every = sorted(directory.glob("*.safetensors"))
    # Mistral ships its weights a second time under its own names.
    files = [path for path in every if not path.name.startswith("consolidated")] or every
    if files:
        return files
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if not pickles:
        raise ModelError(f"{directory} has no *.safetensors; give the directory of a complete Hugging Face checkpoint")
    raise ModelError(
        f"{directory} has its weights only as pickles ({', '.join(pickles[:4])}). Loading them can run code, so Tuili "
        'never does. If you trust them, convert once: `python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{directory}').save_pretrained('{directory}-safetensors')\"`, and copy the tokenizer."
    )


def _indexed(index: Path) -> list[Path]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise ModelError(f"{index}: weight_map={str(table)[:80]!r} must map tensor names to file names")
    names = sorted(set(table.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise ModelError(f"{index} names files outside its directory: {listed(outside)}")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise ModelError(f"{index.parent} lacks {len(missing)} of {len(names)} weight files; fetch {listed(missing)}")
    return [index.parent / name for name in names]


def open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error}); download it again") from error


# Which tensor is which -----------------------------------------------------------------------------------------------


def layout_of(name: str, layouts: Layouts) -> Layout | None:
    """How the files hold the tensor ``name``, where it is rounded."""
    return layouts.get(name.removesuffix(".weight")) if name.endswith(".weight") else None


def needs_of(expected: dict[str, Slot], parameters: Mapping[str, torch.Tensor], layouts: Layouts) -> Needs:
    """What the files must hold, by name, and the shapes that each may have."""
    needs: Needs = {}
    for name, slot in expected.items():
        rest, layout = parameters[slot.parameter].shape[1:], layout_of(name, layouts)
        if layout is None:
            needs[name] = ((slot.rows, *rest),)
            continue
        for end, shapes in layout.tensors(slot.rows, *rest).items():
            needs[f"{name.removesuffix('.weight')}.{end}"] = shapes
    return needs


def optional_of(layouts: Layouts) -> set[str]:
    return {f"{module}.{end}" for module, layout in layouts.items() for end in layout.optional}


def match(files: list[tuple[Path, Any]], family: type[Family], needs: Needs) -> Found:
    """Tensors of ``files`` by their name in the family's table; what is known not to be a parameter is left out."""
    found: Found = {}
    ignored = 0
    headless = not any(name.startswith("lm_head.") for name in needs)
    for path, file in files:
        for stored in file.keys():  # noqa: SIM118 (no mapping: it has no __iter__)
            name = _plain(stored, family.prefixes)
            tied = headless and name.startswith("lm_head.")
            if tied or stored.endswith(NOT_PARAMETERS + CACHE_SCALES) or stored.startswith(family.ignored):
                ignored += 1
                continue
            if name in found:
                raise ModelError(f"{path}: tensor {stored!r} is there twice (in another file, or under two names)")
            found[name] = (file, stored)
    if ignored:
        what = "tied head, vision tower, buffers, ranges of the KV cache"
        log.info("%d tensors are not part of the model that runs (%s): left out", ignored, what)
    return found


def _plain(stored: str, prefixes: Mapping[str, str]) -> str:
    for prefix, plain in prefixes.items():
        if stored.startswith(prefix):
            return plain + stored.removeprefix(prefix)
    return stored


def check(needs: Needs, optional: set[str], found: Found, checkpoint: Checkpoint) -> None:
    """ModelError listing every missing, unexpected and misshapen tensor."""
    shaped = []
    for name in needs.keys() & found.keys():
        file, stored = found[name]
        have = list(file.get_slice(stored).get_shape())
        if tuple(have) not in needs[name]:
            shaped.append(f"{stored} (is {have}, config.json says {list(needs[name][0])})")
    missing = sorted(needs.keys() - found.keys())
    unexpected = sorted(found[name][1] for name in found.keys() - needs.keys() - optional)
    parts = [
        f"{len(names)} {what}: {listed(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", sorted(shaped)))
        if names
    ]
    if parts:
        rounded = f", quantization_config: {checkpoint.spec.rounded.method}" if checkpoint.spec.rounded else ""
        raise ModelError(
            f"the tensors of {checkpoint.path} do not fit config.json ({checkpoint.spec.family}{rounded}). "
            f"{'; '.join(parts)}. Check that config.json belongs to these weights and that the download is complete."
        )


def listed(names: Iterable[str]) -> str:
    return ", ".join(names)
