from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fahooks.data.order import epoch_order, shares, shuffled


def test_an_order_is_a_permutation_fixed_by_seed_and_epoch():
    order = epoch_order(100, seed=3, epoch=7)
    assert torch.equal(order.sort().values, torch.arange(100))
    assert torch.equal(order, epoch_order(100, seed=3, epoch=7))
    assert not torch.equal(order, epoch_order(100, seed=3, epoch=8))
    assert not torch.equal(order, epoch_order(100, seed=4, epoch=7))


def test_seed_and_epoch_are_not_mixed_up():
    assert not torch.equal(epoch_order(100, seed=1, epoch=2), epoch_order(100, seed=2, epoch=1))
    assert not torch.equal(shuffled(100, "a", 1), shuffled(100, "b", 1))


def test_orders_neither_read_nor_move_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = epoch_order(50, seed=0, epoch=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(epoch_order(50, seed=0, epoch=0), first)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 5), st.booleans(), st.integers(0, 3))
def test_ranks_share_each_batch(count: int, batch_size: int, world: int, equal: bool, start: int):
    order = shuffled(count, "x")
    by_rank = [list(shares(order, batch_size, rank=r, world=world, equal=equal, start=start)) for r in range(world)]
    expected = order.split(batch_size)[start:]
    assert all(len(own) == len(expected) for own in by_rank)
    for batch, parts in zip(expected, zip(*by_rank, strict=True), strict=True):
        assert torch.equal(torch.cat([p.index[p.valid] for p in parts]), batch), "each example of the batch once"
        assert {p.count for p in parts} == {len(batch)}
        sizes = [len(p.index) for p in parts]
        assert min(sizes) >= 1 and max(sizes) - min(sizes) <= (0 if equal else 1)
        if not equal:
            assert all(p.valid.all() or len(p.index) == 1 for p in parts), "only who would have none is filled up"


def test_one_rank_has_every_batch_whole():
    (share,) = shares(torch.tensor([4, 2, 9]), 3, rank=0, world=1, equal=True)
    assert share.index.tolist() == [4, 2, 9] and share.valid.all()


@pytest.mark.parametrize(
    ("rank", "equal", "index", "valid"), [(1, False, [3], [True]), (2, False, [5], [False]), (1, True, [3], [True])]
)
def test_who_would_have_none_gets_an_example_that_does_not_count(rank: int, equal: bool, index: list[int], valid: list[bool]):
    (share,) = shares(torch.tensor([5, 3]), 4, rank=rank, world=3, equal=equal)
    assert (share.index.tolist(), share.valid.tolist(), share.count) == (index, valid, 2)
