"""Kernels, loss, optimizer and schedule against torch, algebra and the definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tuili import ops
from tuili.layers.decoder import Decoder
from tuili.train import kernels, loop, schedule
from tuili.train.batch import TrainBatch
from tuili.train.export import model_spec
from tuili.train.loss import cross_entropy
from tuili.train.optimizer import Optimizer, orthogonalize
from tuili.train.recipe import Recipe


@pytest.mark.parametrize("sample", ops.table["causal_attention"].samples(), ids=lambda s: s.name)
def test_the_training_kernel_meets_its_reference(sample: ops.Sample) -> None:
    args, kwargs = sample.make(torch.Generator().manual_seed(0))
    want = ops.table["causal_attention"].reference(*args, **kwargs)
    kernels = ops.kernels_of("train")
    got = kernels.causal_attention(*args, **kwargs)
    tolerance = 1e-5 if want.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads"), [(1, 2, 1), (255, 4, 2), (256, 2, 2), (257, 4, 1), (700, 4, 2)]
)
def test_blocked_attention_has_the_reference_gradient(length: int, heads: int, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(length)
    shapes = ((2, length, heads, 8), (2, length, kv_heads, 8), (2, length, kv_heads, 8))
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    weight = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    grads = []
    for attend in (kernels.causal_attention, ops.table["causal_attention"].reference):
        grads.append(torch.autograd.grad((attend(*inputs, 0.3) * weight).sum(), inputs))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


def test_sliced_cross_entropy_is_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1300, 16, generator=generator, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, 50, (1300,), generator=generator)
    targets[::3] = -100
    got = cross_entropy(hidden, weight, targets) / 7
    want = F.cross_entropy(hidden @ weight.t(), targets, reduction="sum") / 7
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_cross_entropy_of_no_target_is_zero() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    loss = cross_entropy(hidden, torch.randn(5, 4, requires_grad=True), torch.full((3,), -100))
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_adamw_is_torchs(recipe: Recipe) -> None:
    model = Decoder(model_spec(recipe))
    loop.initialize(model, 3)
    ours = {n: p.detach().clone() for n, p in model.named_parameters()}
    theirs = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    groups = [
        {"params": [p for p in theirs.values() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    optimizer = Optimizer(model, ours, False, (0.9, 0.95), 0.1, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for count in range(1, 6):
        for name, weight in theirs.items():
            weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.update(name, weight.grad.clone(), 1e-2, count)
        reference.step()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 64), (128, 32), (32, 128)])
def test_orthogonalize_keeps_the_directions_and_levels_the_singular_values(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    made = orthogonalize(matrix, dtype)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = (u.t() @ made @ vh.t())[s > 0.1 * s[0], :][:, s > 0.1 * s[0]]
    assert kept.diag().min() > 0.6
    assert kept.diag().max() < 1.3
    assert (kept - kept.diag().diag()).abs().max() < 0.1


def test_muon_moves_projections_alone(recipe: Recipe) -> None:
    model = Decoder(model_spec(recipe))
    optimizer = Optimizer(
        model, {n: p.detach() for n, p in model.named_parameters()}, True, (0.9, 0.95), 0.0, torch.float32
    )
    assert set(optimizer.parts) == {n for n, p in model.named_parameters() if n.endswith("proj.weight")}
    assert not any(f"{n}.second" in optimizer.state for n in optimizer.parts)


def test_the_rate_warms_up_stays_and_falls_to_zero() -> None:
    assert [schedule.factor(i, 0.0, 4, 0.2) for i in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule.factor(100, 0.8, 4, 0.2) == pytest.approx(1.0)
    assert schedule.factor(100, 0.9, 4, 0.2) == pytest.approx(0.5)
    assert schedule.factor(100, 1.0, 4, 0.2) == schedule.factor(100, 1.2, 4, 0.2) == 0


def test_a_team_has_the_gradient_of_one_plain_model(recipe: Recipe) -> None:
    """Two replicas with packed documents, against autograd over each document alone."""
    spec = model_spec(recipe)
    team = loop.Team(spec, torch.float32, torch.device("cpu"), 2)
    plain = Decoder(spec)
    loop.initialize(plain, 0)
    plain.prepare(spec.max_model_len)
    team.read({n: p.detach() for n, p in plain.named_parameters()})
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, spec.vocab_size, (n,), generator=generator) for n in (9, 30, 17, 2)]
    packed = [together(ids[:2]), together(ids[2:])]
    losses = []
    for x in ids:
        batch = together([x])
        scores = plain.logits(plain(plain.embed(batch.ids), batch, None))
        losses.append(F.cross_entropy(scores, batch.targets, reduction="sum"))
    total = sum(losses, torch.zeros(())) / sum(len(x) - 1 for x in ids)
    total.backward()
    grads, loss = team.gradient(packed)
    assert team.evaluate(packed) == pytest.approx(loss, rel=1e-5)
    team.close()
    assert loss == pytest.approx(total.item(), rel=1e-5)
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(grads[name], weight.grad, rtol=1e-3, atol=1e-6)


def together(documents: list[torch.Tensor]) -> TrainBatch:
    starts = torch.tensor([0, *(len(x) - 1 for x in documents)]).cumsum(0).tolist()
    return TrainBatch(
        torch.cat([x[:-1] for x in documents]),
        torch.cat([x[1:] for x in documents]),
        torch.cat([torch.arange(len(x) - 1) for x in documents]),
        tuple(starts),
    )


def test_clipping_scales_to_the_limit() -> None:
    grads = {"a": torch.full((2,), 3.0), "b": torch.full((7,), 3.0)}
    assert loop.clip(grads, 1.0) == pytest.approx(9.0)
    assert loop.clip(grads, 0.0) == pytest.approx(1.0, rel=1e-5)
