from __future__ import annotations

import pytest
import torch

from fahooks.data import Augment, Images, MemoryLoader, epoch_order
from fahooks.data.order import Batch

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = Images(torch.randint(0, 256, (23, 2, 4, 4), dtype=torch.uint8, generator=GENERATOR), torch.arange(23))


def loader(**options: object) -> MemoryLoader:
    mean, std = IMAGES.statistics()
    return MemoryLoader(IMAGES, **{"batch_size": 5, "mean": mean, "std": std, **options})  # type: ignore[arg-type]


def joined(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat([getattr(b, name) for b in batches]) for name in ("images", "labels", "index")))


def test_an_epoch_has_every_image_once_in_the_shared_order():
    batches = list(loader(seed=3).epoch(2))
    assert [len(b.labels) for b in batches] == [5, 5, 5, 5, 3]
    everything = joined(batches)
    assert torch.equal(everything.index, epoch_order(23, seed=3, epoch=2))
    assert torch.equal(everything.labels, IMAGES.labels[everything.index])
    assert (len(loader()), loader().images) == (5, 23)


def test_images_are_normalised_by_channel():
    mean, std = IMAGES.statistics()
    everything = joined(list(loader().in_order()))
    expected = (IMAGES.pixels.double() - mean.double().view(2, 1, 1)) / std.double().view(2, 1, 1)
    assert everything.images.dtype == torch.float32
    torch.testing.assert_close(everything.images, expected.float())
    torch.testing.assert_close(everything.images.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)


def test_a_channel_that_never_changes_does_not_divide_by_zero():
    flat = Images(torch.full((4, 1, 2, 2), 9, dtype=torch.uint8), torch.zeros(4).long())
    mean, std = flat.statistics()
    batch = next(MemoryLoader(flat, batch_size=4, mean=mean, std=std).in_order())
    assert torch.equal(batch.images, torch.zeros(4, 1, 2, 2))


def test_epochs_depend_on_seed_and_epoch_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    first = joined(list(loader(seed=1).epoch(1)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert torch.equal(joined(list(loader(seed=1).epoch(1))).images, first.images)
    assert not torch.equal(joined(list(loader(seed=1).epoch(2))).index, first.index)
    assert not torch.equal(joined(list(loader(seed=2).epoch(1))).index, first.index)


def test_training_images_are_augmented_and_others_cropped_to_the_centre():
    augment = Augment([{"crop": {"size": 3}}, {"flip": {}}], seed=5)
    mean, std = IMAGES.statistics()
    trained = joined(list(loader(seed=5, augment=augment).epoch(4)))
    pixels = augment.train(IMAGES.pixels[trained.index], 4, trained.index)
    torch.testing.assert_close(trained.images, (pixels.float() - mean.view(2, 1, 1)) / std.view(2, 1, 1))
    assert torch.equal(trained.images, joined(list(loader(seed=5, augment=augment, batch_size=7).epoch(4))).images)
    evaluated = joined(list(loader(augment=augment).in_order()))
    assert torch.equal(evaluated.images, joined(list(loader().in_order())).images[:, :, :3, :3])


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_memory_format_is_as_asked(channels_last: bool):
    batch = next(loader(channels_last=channels_last).epoch(0))
    assert batch.images.is_contiguous(memory_format=torch.channels_last) is channels_last


def test_a_batch_is_not_overwritten_by_the_next():
    batches = loader().epoch(0)
    first = next(batches)
    kept = first.images.clone()
    next(batches)
    assert torch.equal(first.images, kept)
