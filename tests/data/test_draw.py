from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fahooks.data import draw
from fahooks.data.draw import Draw

INDEX = torch.arange(4000)


def drawn(count: int, *key: str | int, index: Tensor = INDEX) -> Tensor:
    return Draw(index, ("test",)).below(count, *key)


def test_splitmix64_is_that_of_its_authors():
    """The first outputs of the reference implementation in C (https://prng.di.unimi.it/splitmix64.c) for state 1234567."""
    states = torch.tensor([1234567]) + draw._GOLDEN * torch.arange(1, 4)
    outputs = [value % 2**64 for value in draw._splitmix64(states).tolist()]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("count", [2, 3, 9, 1000])
def test_numbers_are_uniform(count: int):
    found = torch.bincount(drawn(count) // max(1, count // 10))
    expected = torch.bincount(torch.arange(count) // max(1, count // 10)) * len(INDEX) / count
    # Pearson's chi-squared has mean k - 1 and variance 2 (k - 1).
    freedom = len(found) - 1
    assert ((found - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5
    assert drawn(count).min() >= 0 and drawn(count).max() < count


def test_numbers_of_different_keys_and_of_neighbours_are_independent():
    first, second = drawn(1000, "row").double(), drawn(1000, "column").double()
    pairs = [(first, second), (first[1:], first[:-1]), (first, Draw(INDEX, ("test", 1)).below(1000, "row").double())]
    for one, other in pairs:
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 5 / len(INDEX) ** 0.5
    assert torch.equal(first, drawn(1000, "row").double()), "control: equal keys give equal numbers"


@given(st.integers(1, 2**31), st.lists(st.integers(0, 2**40), min_size=1, max_size=5))
def test_numbers_are_in_range_for_any_index(count: int, index: list[int]):
    numbers = drawn(count, index=torch.tensor(index))
    assert (numbers >= 0).all() and (numbers < count).all()


@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(1, 2**31)), min_size=1, max_size=5))
def test_each_image_may_have_its_own_range(pairs: list[tuple[int, int]]):
    index, count = (torch.tensor(values) for values in zip(*pairs, strict=True))
    together = Draw(index, ("test",)).below(count, "x")
    assert together.tolist() == [drawn(c, "x", index=torch.tensor([i])).item() for i, c in pairs]


def test_real_numbers_are_uniform_between_two():
    numbers = Draw(INDEX, ("test",)).between(-2.0, 6.0, "x")
    assert numbers.dtype == torch.float64 and numbers.min() >= -2 and numbers.max() < 6
    # Mean and variance of the uniform distribution, with five standard errors of the mean.
    assert abs(numbers.mean() - 2) < 5 * (64 / 12 / len(INDEX)) ** 0.5
    assert numbers.var().item() == pytest.approx(64 / 12, rel=0.1)
