from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fahooks.data import Augment, Examples, Files, Images, Share, Stream, View
from fahooks.data.decoding import CorruptFile, CorruptFileWarning

IMAGES = Images(torch.arange(10).byte().view(10, 1, 1, 1).expand(10, 1, 2, 2), torch.arange(100, 110))
EXAMPLES = Examples("x", IMAGES, torch.arange(10))
VIEW = View(batch_size=4, training=False, mean=torch.tensor([1.0]), std=torch.tensor([2.0]))


class Noted(Stream):
    """The smallest stream of its own, which notes what happens to it."""

    def __init__(self, examples: Examples, view: View) -> None:
        super().__init__(examples, view)
        self.notes: list[str] = []

    def decoded(self, shares: Sequence[Share]) -> Generator[tuple[Share, Tensor]]:
        self.notes.append(f"asked for {len(shares)}")
        try:
            for share in shares:
                yield share, self.augment(IMAGES.pixels[share.index], share.index)
        finally:
            self.notes.append("closed")


def test_a_stream_needs_nothing_but_pixels():
    stream = Noted(EXAMPLES, VIEW)
    batches = list(stream)
    assert [b.index.tolist() for b in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert batches[0].labels.tolist() == [100, 101, 102, 103]
    assert batches[1].images[:, 0, 0, 0].tolist() == [1.5, 2.0, 2.5, 3.0]
    assert stream.notes == ["asked for 3", "closed"]


def test_whoever_stops_early_closes_what_was_opened():
    stream = Noted(EXAMPLES, VIEW)
    for _ in stream:
        assert stream.notes == ["asked for 3"]
        break
    assert stream.notes == ["asked for 3", "closed"]


def test_two_ranks_see_each_example_once_and_equally_many():
    counted: list[int] = []
    for rank in (0, 1):
        batches = list(Noted(EXAMPLES, View(**{**vars(VIEW), "rank": rank, "world": 2, "batch_size": 3})))
        assert [len(b.labels) for b in batches] == [2, 2, 2, 1] and [b.count for b in batches] == [3, 3, 3, 1]
        counted += [i for b in batches for i in b.index[b.valid].tolist()]
    assert sorted(counted) == list(range(10))


def test_a_batch_of_more_than_there_are_has_all_of_them():
    (batch,) = Noted(EXAMPLES, View(**{**vars(VIEW), "batch_size": 99, "training": True}))
    assert (batch.count, sorted(batch.index.tolist())) == (10, list(range(10)))


def test_a_file_that_is_skipped_is_named_and_nothing_is_advised_that_is_set_already(tmp_path: Path):
    path = tmp_path / "x.png"
    path.write_bytes(b"nothing")
    examples = Examples("x", Files([str(path)], torch.zeros(1).long(), side=2), torch.arange(1))
    with pytest.raises(CorruptFile, match="x.png can not be decoded .*: replace or remove it, or leave .* data.corrupt=skip"):
        Noted(examples, VIEW).read(0)
    stream = Noted(examples, View(**{**vars(VIEW), "corrupt": "skip"}))
    with pytest.warns(CorruptFileWarning, match="^skipped: .*x.png can not be decoded .*: replace or remove it$") as caught:
        assert stream.read(0) is None and stream.read(0) is None
    assert len(caught) == 1


def test_training_is_augmented_by_epoch_and_evaluation_is_not():
    moving = Augment([{"crop": {"padding": 1}}])
    training = Noted(EXAMPLES, View(**{**vars(VIEW), "training": True, "augment": moving}))
    first = torch.cat([b.images for b in training])
    training.set_epoch(1)
    assert not torch.equal(first, torch.cat([b.images for b in training]))
    evaluation = Noted(EXAMPLES, View(**{**vars(VIEW), "augment": moving}))
    first = torch.cat([b.images for b in evaluation])
    evaluation.set_epoch(1)
    assert torch.equal(first, torch.cat([b.images for b in evaluation]))


def test_a_stream_is_a_context_manager():
    with Noted(EXAMPLES, VIEW) as stream:
        assert len(stream) == 3
    stream.close()


@pytest.mark.parametrize(
    ("count", "parts", "world", "sizes"),
    [(10, 1, 1, [10]), (10, 3, 1, [4, 3, 3]), (10, 3, 4, [5, 5]), (2, 8, 1, [1, 1]), (0, 2, 1, [0])],
)
def test_a_batch_in_parts_is_the_batch(count: int, parts: int, world: int, sizes: list[int]):
    (batch,) = Noted(Examples("x", IMAGES, torch.arange(10)), replace(VIEW, batch_size=10))
    batch = replace(batch, **{k: getattr(batch, k)[:count] for k in ("images", "labels", "index", "valid")}, count=count)
    cut = batch.split(parts, world)
    assert [len(part.labels) for part in cut] == sizes and {part.count for part in cut} == {count}
    for name in ("images", "labels", "index", "valid"):
        assert torch.equal(torch.cat([getattr(part, name) for part in cut]), getattr(batch, name))
