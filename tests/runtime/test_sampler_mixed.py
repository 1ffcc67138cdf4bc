"""A greedy row beside rows that draw: its temperature, however small, takes no part."""

from __future__ import annotations

import pytest
import torch

from tuili.core.params import SamplingParams
from tuili.runtime.rows import Row
from tuili.runtime.sampler import choose_tokens, read_tokens, settings


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 9e-6])
def test_greedy_rows_are_exact_in_a_mixed_batch(temperature: float) -> None:
    """Law 14. The two highest scores differ by one unit in the last place: divided by 9e-6, both would be drawn."""
    highest = torch.tensor(8.0)
    logits = torch.zeros(2, 50)
    logits[:, 7], logits[:, 3] = highest, torch.nextafter(highest, torch.tensor(0.0))
    greedy, free = (SamplingParams(max_tokens=9, temperature=t, seed=1) for t in (temperature, 1.0))
    assert greedy.greedy
    drawn = set()
    for position in range(40):
        for order in (1, -1):
            params = [greedy, free][::order]
            rows = [Row(i, own, 1, []) for i, own in enumerate(params)]
            wishes = [torch.from_numpy(wish) for wish in settings(params, [position] * 2)]
            tokens = read_tokens(choose_tokens(logits, rows, [position] * 2, wishes), rows).tokens[::order]
            assert tokens[0] == 7, position
            drawn.add(tokens[1])
    assert len(drawn) > 1, "the other row does not draw"
