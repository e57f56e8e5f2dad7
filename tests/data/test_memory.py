from __future__ import annotations

from typing import Any

import pytest
import torch

from fahooks.data import Augment, Batch, Examples, Images, MemoryLoader, Stream, View, epoch_order
from fahooks.plugins import InputError

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = Images(torch.randint(0, 256, (23, 2, 4, 4), dtype=torch.uint8, generator=GENERATOR), torch.arange(23))


def opened(images: Images = IMAGES, epoch: int = 0, **options: Any) -> Stream:
    mean, std = images.statistics()
    view = View(**{"batch_size": 5, "training": True, "mean": mean, "std": std, **options})
    stream = MemoryLoader().open(Examples("x", images, torch.arange(len(images))), view)
    stream.set_epoch(epoch)
    return stream


def joined(stream: Stream) -> Batch:
    batches = list(stream)
    tensors = (torch.cat([getattr(b, name) for b in batches]) for name in ("images", "labels", "index", "valid"))
    return Batch(*tensors, count=sum(b.count for b in batches))


def test_an_epoch_has_every_image_once_in_the_shared_order():
    stream = opened(seed=3, epoch=2)
    assert [len(b.labels) for b in stream] == [b.count for b in stream] == [5, 5, 5, 5, 3]
    everything = joined(stream)
    assert torch.equal(everything.index, epoch_order(23, seed=3, epoch=2))
    assert torch.equal(everything.labels, IMAGES.labels[everything.index])
    assert everything.valid.all() and everything.valid.dtype == torch.bool
    assert (len(stream), stream.images) == (5, 23)


def test_an_epoch_may_begin_in_its_middle():
    stream = opened()
    everything = joined(stream)
    stream.set_epoch(0, start=2)
    assert torch.equal(joined(stream).index, everything.index[10:]) and len(stream) == 5
    stream.set_epoch(0, start=5)
    assert list(stream) == []


def test_examples_are_where_the_split_says():
    places = torch.tensor([20, 3, 7])
    mean, std = IMAGES.statistics()
    view = View(batch_size=2, training=False, mean=mean, std=std)
    everything = joined(MemoryLoader().open(Examples("x", IMAGES, places), view))
    assert everything.index.tolist() == [0, 1, 2] and everything.labels.tolist() == places.tolist()
    assert torch.equal(everything.images, joined(opened(training=False)).images[places])


def test_images_are_normalised_by_channel():
    mean, std = IMAGES.statistics()
    everything = joined(opened(training=False))
    expected = (IMAGES.pixels.double() - mean.double().view(2, 1, 1)) / std.double().view(2, 1, 1)
    assert everything.images.dtype == torch.float32
    torch.testing.assert_close(everything.images, expected.float())
    torch.testing.assert_close(everything.images.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)


def test_a_channel_that_never_changes_does_not_divide_by_zero():
    flat = Images(torch.full((4, 1, 2, 2), 9, dtype=torch.uint8), torch.zeros(4).long())
    assert torch.equal(joined(opened(flat)).images, torch.zeros(4, 1, 2, 2))


def test_epochs_depend_on_seed_and_epoch_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    first = joined(opened(seed=1, epoch=1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert torch.equal(joined(opened(seed=1, epoch=1)).images, first.images)
    assert not torch.equal(joined(opened(seed=1, epoch=2)).index, first.index)
    assert not torch.equal(joined(opened(seed=2, epoch=1)).index, first.index)


def test_training_images_are_augmented_and_others_cropped_to_the_centre():
    augment = Augment([{"crop": {"size": 3}}, {"flip": {}}], seed=5)
    mean, std = IMAGES.statistics()
    trained = joined(opened(seed=5, augment=augment, epoch=4))
    pixels = augment.train(IMAGES.pixels[trained.index], 4, trained.index)
    torch.testing.assert_close(trained.images, (pixels.float() - mean.view(2, 1, 1)) / std.view(2, 1, 1))
    assert torch.equal(trained.images, joined(opened(seed=5, augment=augment, batch_size=7, epoch=4)).images)
    evaluated = joined(opened(augment=augment, training=False))
    assert torch.equal(evaluated.images, joined(opened(training=False)).images[:, :, :3, :3])


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_memory_format_is_as_asked(channels_last: bool):
    batch = next(iter(opened(channels_last=channels_last)))
    assert batch.images.is_contiguous(memory_format=torch.channels_last) is channels_last


def test_a_batch_is_not_overwritten_by_the_next():
    batches = iter(opened())
    first = next(batches)
    kept = first.images.clone()
    next(batches)
    assert torch.equal(first.images, kept)


def test_a_device_without_room_is_one_line(monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    examples = Examples("x", IMAGES, torch.arange(23))
    view = View(batch_size=5, training=True, mean=torch.zeros(2), std=torch.ones(2))
    labels = IMAGES.labels
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **k: full() if self.dtype == torch.uint8 else labels)
    with pytest.raises(InputError, match="23 images take 0.0 GiB, which cpu does not have free: use fewer with data.limit"):
        MemoryLoader().open(examples, view)
