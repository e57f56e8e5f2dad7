from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import fahooks
from fahooks.training.average import Average


def pair() -> tuple[Any, Any]:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5))
    trained = copy.deepcopy(plain)
    fahooks.convert(trained, "dfa")
    return plain, trained


def test_weights_and_running_statistics_are_averaged_by_name_and_counts_copied():
    plain, trained = pair()
    average = Average(plain, trained, decay=0.05)
    start, statistics = plain[0].weight.clone(), plain[1].running_mean.clone()
    trained(torch.randn(2, 3, 6, 6)).sum().backward()  # the rule draws B now
    assert len(trained.state_dict()) > len(plain.state_dict())
    with torch.no_grad():
        trained[0].weight += 1.0
    average.update()
    torch.testing.assert_close(plain[0].weight, 0.05 * start + 0.95 * trained[0].weight)
    torch.testing.assert_close(plain[1].running_mean, 0.05 * statistics + 0.95 * trained[1].running_mean)
    assert plain[1].num_batches_tracked == trained[1].num_batches_tracked == 1
    assert not any(p.requires_grad for p in plain.parameters())


def test_its_state_goes_on_where_it_was():
    plain, trained = pair()
    average = Average(plain, trained, decay=0.99)
    for _ in range(3):
        with torch.no_grad():
            trained[3].bias += 1.0
        average.update()
    other_plain, _ = pair()
    other = Average(other_plain, trained, decay=0.99)
    other.load_state_dict(average.state_dict())
    with torch.no_grad():
        trained[3].bias += 1.0
    average.update()
    other.update()
    assert (average.steps, other.steps) == (4, 4)
    assert torch.equal(plain[3].bias, other_plain[3].bias)
