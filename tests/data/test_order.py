from __future__ import annotations

import torch

from fahooks.data.order import epoch_order, shuffled


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
