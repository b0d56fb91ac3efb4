"""Choosing tokens: the distributions, and that randomness belongs to (seed, row, step)."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from shared.specs import Generation
from workers.ranks.engine.sampling import Draw, next_tokens, uniform


def test_uniform_is_fixed_and_spread():
    # Fixed for ever: a resumed job must draw what it drew before an upgrade.
    assert uniform(0, 0, 0) == pytest.approx(0.08234954794796834, abs=1e-15)
    numbers = [uniform(1, row, step) for row in range(50) for step in range(40)]
    assert len(set(numbers)) == 2000
    assert min(numbers) >= 0 and max(numbers) < 1
    assert sum(numbers) / 2000 == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 0.9, "top_k": 8, "top_p": 0.6},
        {"temperature": 1.0, "top_p": 0.01},
    ],
)
def test_frequencies_are_those_of_transformers_warpers(options):
    torch.manual_seed(0)
    logits = torch.randn(1, 20) * 2
    warped = TemperatureLogitsWarper(options["temperature"])(None, logits)
    if "top_k" in options:
        warped = TopKLogitsWarper(options["top_k"])(None, warped)
    if "top_p" in options:
        warped = TopPLogitsWarper(options["top_p"])(None, warped)
    expected = warped.softmax(-1)[0]
    n = 6000
    sampling = Generation(**options)
    drawn = next_tokens(logits.expand(n, 20), [Draw(sampling, i, 3) for i in range(n)])
    counts = Counter(drawn)
    assert all(expected[token] > 0 for token in counts)
    for token in range(20):
        assert counts[token] / n == pytest.approx(expected[token].item(), abs=0.025)


def test_a_row_draws_the_same_in_any_batch():
    torch.manual_seed(1)
    logits = torch.randn(9, 50)
    sampling = Generation(temperature=1.0, top_p=0.95, seed=4)
    keys = [Draw(sampling, 100 + i, i) for i in range(9)]
    together = next_tokens(logits, keys)
    order = [4, 0, 8, 2]
    assert next_tokens(logits[order], [keys[i] for i in order]) == [together[i] for i in order]
