"""The Triton kernels beyond the op table's samples: packings, odd shapes, splits, and law 5 of the invariant backend.

Interpreted on the CPU; skipped where Triton is not installed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tuili import ops
from tuili.base.errors import ConfigError
from tuili.ops import triton
from tuili.ops.samples import paged, randn
from tuili.ops.triton import layouts, tuning

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(not triton.describe().usable, reason=triton.describe().why)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(have: torch.Tensor, want: torch.Tensor) -> None:
    assert have.shape == want.shape
    assert have.dtype == want.dtype
    assert torch.isfinite(have).all()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[have.dtype]
    largest = max(1.0, float(want.float().abs().max())) if want.numel() else 1.0
    assert bool(((have.float() - want.float()).abs() <= tolerance * largest).all())


# Packing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("size", [(1, 1), (64, 128), (65, 129), (130, 96), (200, 384)], ids=str)
def test_packing_of_4_bits_is_a_bijection(size: tuple[int, int], group: int) -> None:
    codes = torch.randint(1, 16, size, generator=generator(), dtype=torch.uint8)
    tiles = layouts.pack_int4(codes, group)
    assert tiles.is_contiguous()
    assert tiles.shape == (-(-size[0] // 64), -(-size[1] // group), 64, group // 2)
    assert torch.equal(layouts.unpack_int4(tiles, *size), codes)
    used = int((tiles & 15 != 0).sum() + (tiles >> 4 != 0).sum())
    assert used == codes.numel()  # the rest is padding, and zero


def test_packing_of_group_numbers_is_a_bijection() -> None:
    values = randn(generator(), 70, 5)
    assert torch.equal(layouts.by_output(layouts.by_tile(values), 70), values)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.int8, layouts.FP8], ids=str)
@pytest.mark.parametrize("block", [160, 128])
def test_rounding_of_rows_is_the_references(dtype: torch.dtype, block: int) -> None:
    from tuili.ops.triton.products import round_rows

    x = randn(generator(), 5, 160, dtype=torch.bfloat16) * torch.logspace(-3, 3, 160)
    x[2] = 0
    device = "cpu" if triton.describe().interpreted else "cuda"
    have, want = [t.cpu() for t in round_rows(x.to(device), dtype, block)], layouts.round_rows(x, dtype, block)
    assert torch.equal(have[0].float(), want[0].float())
    assert torch.equal(have[1], want[1])


# Shapes and layouts that the samples do not have ----------------------------------------------------------------------


@needs_triton
def test_rows_that_do_not_lie_end_to_end() -> None:
    wide = randn(generator(), 6, 400, dtype=torch.bfloat16)
    q, k = wide[:, :192].view(6, 6, 32), wide[:, 192:256].view(6, 2, 32)
    weight, angle = randn(generator(1), 32, dtype=torch.bfloat16), torch.rand(6, 16, generator=generator(2))
    gate, ids = wide[:, 100:280], torch.tensor([5, 0, 5])
    kernels = ops.kernels_of("triton")
    have = [kernels.rms_norm(q, weight, 1e-6), kernels.rotate(k, angle.cos(), angle.sin()), kernels.gated(gate, "gelu")]
    have += [kernels.embedding(wide[:, :100], ids), kernels.rms_norm(wide[:0], wide[0], 1e-6)]
    want = [ops.rms_norm(q, weight, 1e-6), ops.rotate(k, angle.cos(), angle.sin()), ops.gated(gate, "gelu")]
    want += [ops.embedding(wide[:, :100], ids), ops.rms_norm(wide[:0], wide[0], 1e-6)]
    for one, other in zip(have, want, strict=True):
        close(one, other)


@needs_triton
@pytest.mark.parametrize("backend", [triton.FAST, triton.INVARIANT])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_with_many_splits_and_odd_sizes(dtype: torch.dtype, backend: str) -> None:
    """Groups of 7 heads of 80 dimensions; contexts over several splits (partitions), one of them of one key."""
    for queries, contexts in (([1, 1], [1400, 1]), ([3, 1, 20], [1100, 40, 20])):
        args = paged(generator(), dtype, queries, contexts, 7, 1, 80)
        kernels = ops.kernels_of(backend)
        have = kernels.paged_attention(*args, 80**-0.5)
        close(have, ops.paged_attention(*args, 80**-0.5))


@needs_triton
@pytest.mark.parametrize("kind", [{"window": 70}, {"window": 9, "softcap": 8.0}], ids=str)
@pytest.mark.parametrize("queries", [[1, 1, 1], [1, 100, 33]], ids=str)
def test_windows_that_begin_inside_a_tile(queries: list[int], kind: dict[str, Any]) -> None:
    args = paged(generator(), torch.float32, queries, [250, 200, 65], 4, 2, 16)
    for backend in (triton.FAST, triton.INVARIANT):
        kernels = ops.kernels_of(backend)
        have = kernels.paged_attention(*args, 0.25, **kind)
        close(have, ops.paged_attention(*args, 0.25, **kind))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_4_bit_products_split_over_inputs(dtype: torch.dtype) -> None:
    g = generator()
    codes = torch.randint(0, 16, (70, 2048), generator=g, dtype=torch.uint8)
    scales, zeros = (torch.rand(70, 16, generator=g) / 99).half(), torch.randint(0, 16, (70, 16), generator=g)
    packed = layouts.pack_int4(codes, 128), layouts.by_tile(scales), layouts.by_tile(zeros.to(torch.uint8))
    x, bias = randn(g, 2, 2048, dtype=dtype), randn(g, 70, dtype=dtype)
    for backend in (triton.FAST, triton.INVARIANT):
        kernels = ops.kernels_of(backend)
        have = kernels.int4_weight_only_linear(x, *packed, 70, bias)
        close(have, ops.table["int4_weight_only_linear"](x, *packed, 70, bias))


@needs_triton
def test_int8_products_split_over_inputs_are_exact() -> None:
    g = generator()
    codes, scales = torch.randint(-127, 128, (40, 2048), generator=g, dtype=torch.int8), torch.ones(40, 1)
    x = torch.randint(-127, 128, (2, 2048), generator=g).float()
    x[:, 0] = 127
    kernels = ops.kernels_of("triton")
    have = kernels.byte_linear(x, codes, scales)
    assert torch.equal(have, (x.double() @ codes.double().T).float())


@needs_triton
def test_logprobs_of_equals_and_of_what_is_ruled_out() -> None:
    """Equals come by rising id, ids of no chance last; a row that is not finite spoils nobody else's."""
    x = torch.zeros(3, 700)
    x[0, 300:] = -torch.inf
    x[0, 7] = 2.0
    x[1, 5] = torch.nan
    x[2] = torch.arange(700) % 50
    tokens = torch.tensor([300, 0, 49])
    for count in (3, 64, 65, 700):
        kernels = ops.kernels_of("triton")
        have = kernels.logprobs(x, tokens, count)
        want = ops.logprobs(x, tokens, count)
        assert have[0][1].isnan()
        assert have[2][1].isnan().all()
        for one, other in zip(have, want, strict=True):
            assert torch.equal(one[::2].isinf(), other[::2].isinf())
            close(one[::2].float().nan_to_num(neginf=0), other[::2].float().nan_to_num(neginf=0))
        assert torch.equal(have[3][::2], want[3][::2])


# Law 5 ----------------------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("kind", [{}, {"window": 50, "softcap": 15.0}], ids=str)
def test_invariant_attention_sees_neither_chunks_nor_batch(
    kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole prefill over three partitions, a chunk, and decode, alone and together: the same bits."""
    from tuili.ops.triton import attention

    monkeypatch.setattr(attention, "PARTITION", 64)
    q, k, v, table, start, lengths = paged(generator(), torch.bfloat16, [150, 20], [150, 20], 4, 2, 16)
    kernels = ops.kernels_of(triton.INVARIANT)
    whole = kernels.paged_attention(q, k, v, table, start, lengths, 0.25, **kind)
    for first, end in ((70, 100), (149, 150)):
        bounds, length = torch.tensor([0, end - first]), torch.tensor([end])
        have = kernels.paged_attention(q[first:end], k, v, table[:1], bounds, length, 0.25, **kind)
        assert torch.equal(have, whole[first:end])
    rows, bounds = [149, 169], torch.arange(3)
    assert torch.equal(kernels.paged_attention(q[rows], k, v, table, bounds, lengths, 0.25, **kind), whole[rows])


def products(g: torch.Generator) -> dict[str, tuple[Any, ...]]:
    """Op to what follows ``x`` [rows, 1024] in its arguments."""
    codes = torch.randint(0, 16, (70, 1024), generator=g, dtype=torch.uint8)
    scales = layouts.by_tile((torch.rand(70, 8, generator=g) / 99).half())
    rounded = randn(g, 70, 1024).mul(40).to(layouts.FP8)
    return {
        "linear": (randn(g, 70, 1024, dtype=torch.bfloat16),),
        "int4_weight_only_linear": (layouts.pack_int4(codes, 128), scales, None, 70),
        "byte_weight_only_linear": (rounded, torch.rand(70, 1, generator=g)),
        "byte_linear": (rounded, torch.rand(1, 8, generator=g)),
    }


@needs_triton
@pytest.mark.parametrize("name", products(generator()))
def test_invariant_products_do_not_see_their_batch(name: str) -> None:
    g = generator()
    weight, x = products(g)[name], randn(g, 40, 1024, dtype=torch.bfloat16)
    kernels = ops.kernels_of(triton.INVARIANT)
    whole = getattr(kernels, name)(x, *weight)
    for first, last in ((0, 1), (35, 40)):
        assert torch.equal(getattr(kernels, name)(x[first:last], *weight), whole[first:last])


# Tiles ----------------------------------------------------------------------------------------------------------------


def test_a_card_s_file_gives_back_what_was_measured(tmp_path: Path) -> None:
    tiles = {rows: tuning.Tile(64, rows, 128, splits, 4, 3) for rows, splits in ((16, 4), (32, 2), (128, 1))}
    by_rows = {1: tiles[16], 64: tiles[32], 256: tiles[128]}
    decode = {8: tuning.AttentionTile(16, 64, 2, 4, 3)}
    card = tuning.CardTiles("Some Card 9", "3.6.0", {"k 512x256": by_rows}, {"decode int8 4x128": decode})
    path = card.save(tmp_path)
    assert path.name == "some-card-9.json"
    assert tuning.load(path) == card
    found = [card.find("k", rows, 512, 256) for rows in (1, 2, 64, 65, 9999)]
    assert found == [by_rows[rows] for rows in (1, 64, 64, 256, 256)]
    assert card.find("k", 1, 512, 255) is None
    assert card.find_attention("decode", "int8", 4, 128, 3) == decode[8]
    assert card.find_attention("prefill", "int8", 4, 128, 3) is None


def test_a_card_s_file_grows(tmp_path: Path) -> None:
    one, two = tuning.Tile(64, 16, 128, 1, 4, 3), tuning.Tile(128, 16, 128, 1, 4, 3)
    tuning.CardTiles("c", "3.6.0", {"k 1x1": {1: one, 8: one}}).save(tmp_path)
    path = tuning.CardTiles("c", "", {"k 1x1": {8: two}, "other 1x1": {1: two}}).save(tmp_path)
    assert tuning.load(path) == tuning.CardTiles("c", "3.6.0", {"k 1x1": {1: one, 8: two}, "other 1x1": {1: two}})


def test_a_tile_that_does_not_run_is_never_the_fastest() -> None:
    tiles = [tuning.Tile(64, 16, 128, splits, 4, 3) for splits in (1, 2, 4)]
    assert tuning.fastest(tiles, lambda tile: float("inf")) is None
    assert tuning.fastest(tiles, lambda tile: {1: float("inf"), 2: 1.0, 4: 2.0}[tile.splits]) == tiles[1]


@needs_triton
def test_attention_takes_the_tiles_of_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured ones are used, for their phase and their kind of cache only; where keys are split is no matter."""
    from tuili.ops.triton import attention

    known = tuning.CardTiles("", "", {}, {"decode bfloat16 2x16": {4: tuning.AttentionTile(32, 16, 9, 2, 1)}})
    monkeypatch.setattr(tuning, "card", lambda name: known)
    sizes = 4, 2, 16, 4096
    measured = attention.tiling(3, 3, *sizes, torch.bfloat16, 100)
    assert measured == attention.Tiling(32, 16, 64, 2, 1)  # four steps a split: no more
    assert attention.tiling(3, 3, *sizes, torch.int8, 100).keys == 64
    assert attention.tiling(9, 3, *sizes, torch.bfloat16, 100).keys == 64
    args = paged(generator(), torch.bfloat16, [1, 1, 1], [200, 90, 1], 8, 4, 16)
    kernels = ops.kernels_of("triton")
    have = kernels.paged_attention(*args, 0.25)
    close(have, ops.paged_attention(*args, 0.25))


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    for text in ("{", "{}", '{"card": "a", "triton": "", "entries": {"k": {"1": [1, 2]}}}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"card\.json"):
            tuning.load(path)


def test_shipped_files_are_cards() -> None:
    for path in tuning.SHIPPED.glob("*.json"):
        assert tuning.slug(tuning.load(path).name) == path.stem


@pytest.mark.parametrize("rows", [1, 5, 64, 65, 4096])
def test_guessed_tiles_cover_what_there_is(rows: int) -> None:
    tile = tuning.guess(rows, 4096, 4096, 132)
    assert tile.rows & (tile.rows - 1) == 0
    assert tile.rows >= min(rows, 128)
    assert layouts.BLOCK % tile.inputs == 0
    assert tile.splits >= 1


# Without Triton, and for a card ---------------------------------------------------------------------------------------


def test_nothing_needs_triton() -> None:
    """Without it the package imports, says why it has no kernels, and the references of its ops are there."""
    script = """
import sys
sys.modules["triton"] = None
from tuili import ops
from tuili.ops import triton
assert not triton.describe().usable and "tuili[gpu]" in triton.describe().why
assert "triton" not in ops.linear.implementations and "byte_linear" in ops.table
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_triton
@pytest.mark.parametrize(("which", "least"), [([], 300), (["--samples"], 150)], ids=["shapes", "samples"])
def test_every_kernel_compiles_for_an_h200_and_spills_little(which: list[str], least: int) -> None:
    """Ahead of time, with Triton's own assembler: no card needed."""
    script = ROOT / "benchmarks" / "gpu" / "compiled.py"
    done = subprocess.run([sys.executable, script, *which], capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    stacks = [int(line.split(" stack")[1].split()[0]) for line in done.stdout.splitlines() if " stack" in line]
    assert len(stacks) > least
    assert max(stacks) <= 64, done.stdout
