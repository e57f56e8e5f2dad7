from __future__ import annotations

import torch

from fahooks.data import Examples, Images, MemoryLoader, View
from fahooks.data.throughput import measure


def test_each_loader_gets_its_turns_and_whole_epochs():
    examples = Examples("x", Images(torch.zeros(10, 1, 2, 2).byte(), torch.zeros(10).long()), torch.arange(10))
    view = View(4, True, torch.zeros(1), torch.ones(1))
    streams = {name: MemoryLoader().open(examples, view) for name in ("one", "other")}
    found = measure(streams, {"one": 0.5, "other": 1.5}, rounds=3, seconds=0)
    assert [(each.loader, each.opening) for each in found] == [("one", 0.5), ("other", 1.5)]
    assert all(len(each.per_second) == len(each.per_cpu_second) == 3 for each in found)
    assert all(speed > 0 for each in found for speed in (*each.per_second, *each.per_cpu_second))
    assert {stream.epoch for stream in streams.values()} == {6, 7}
    document = found[0].as_dict()
    assert document["images_per_second"] == sorted(found[0].per_second)[1]
