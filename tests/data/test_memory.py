from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fahooks.data import Augment, Batch, Examples, Files, Images, MemoryLoader, Stream, View, epoch_order, memory
from fahooks.data.decoding import CorruptFile, CorruptFileWarning
from fahooks.data.framing import frame
from fahooks.plugins import Failed, InputError

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
    with pytest.raises(Failed, match="23 images take 0.0 GiB, which cpu does not have free: use fewer with data.limit"):
        MemoryLoader().open(examples, view)


# Files.


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Nine images of as many sizes."""
    generator = torch.Generator().manual_seed(0)
    paths = [str(tmp_path / f"{number}.png") for number in range(9)]
    for number, path in enumerate(paths):
        pixels = torch.randint(0, 256, (20 + number, 30 - number, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(path)
    return Files(paths, torch.arange(9), side=8)


def seen(files: Files, **options: Any) -> Batch:
    view = View(**{"batch_size": 4, "training": False, "mean": torch.zeros(3), "std": torch.ones(3), **options})
    return joined(MemoryLoader().open(Examples("x", files, torch.arange(len(files))), view))


def test_files_are_scaled_and_cropped_to_the_centre_where_nothing_else_is_asked(files: Files):
    expected = [frame(image := files.read(n), ((image.shape[1] - s) // 2, (image.shape[2] - s) // 2, s, s), 8)
                for n in range(9) for s in [min(files.read(n).shape[1:])]]  # fmt: skip
    for training in (False, True):
        everything = seen(files, training=training)
        assert torch.equal(everything.images[everything.index.argsort()], torch.stack(expected).float())


def test_boxes_are_cut_out_of_whole_images(files: Files):
    augment = Augment([{"random_resized_crop": {"size": 6}}, {"flip": {}}], seed=3)
    everything = seen(files, training=True, augment=augment)
    assert augment.framing is not None
    sizes = torch.tensor([files.read(n).shape[1:] for n in everything.index.tolist()])
    boxes = augment.framing.train(sizes, augment.draw(augment.framing, 0, everything.index)).tolist()
    cut = torch.stack([frame(files.read(n), box, 6) for n, box in zip(everything.index.tolist(), boxes, strict=True)])
    assert torch.equal(everything.images, augment.train(cut, 0, everything.index, framed=True).float())
    central = augment.framing.evaluate(sizes[everything.index.argsort()]).tolist()
    evaluated = torch.stack([frame(files.read(n), box, 6) for n, box in enumerate(central)])
    assert torch.equal(seen(files, augment=augment).images, evaluated.float())


@pytest.mark.parametrize("steps", [[], [{"random_resized_crop": {"size": 6}}]])
def test_a_corrupt_file_is_refused_or_skipped(files: Files, steps: list[Any]):
    whole = seen(files, augment=Augment(steps))
    Path(files.paths[4]).write_bytes(Path(files.paths[4]).read_bytes()[:300])
    for training in (True, False):
        with pytest.raises(CorruptFile, match=f"{files.paths[4]} can not be decoded"):
            seen(files, training=training, augment=Augment(steps))
        with pytest.warns(CorruptFileWarning, match=f"skipped: {files.paths[4]}"):
            rest = seen(files, training=training, augment=Augment(steps), corrupt="skip")
        order = rest.index.argsort()
        assert rest.valid[order].tolist() == [place != 4 for place in range(9)] and rest.count == 9
        assert not rest.images[order][4].any()
    assert torch.equal(rest.images[rest.valid], whole.images[rest.valid])


def test_what_memory_does_not_hold_is_refused_before_it_is_decoded(files: Files, monkeypatch: pytest.MonkeyPatch):
    Path(files.paths[0]).write_bytes(b"damaged, which nobody gets to see")
    monkeypatch.setattr(memory, "free_bytes", lambda: 9 * 3 * 8 * 8 - 1)
    with pytest.raises(InputError, match="x has 9 images, which take 0.0 GB decoded.*data.loader=ffcv or torchvision") as caught:
        seen(files)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(memory, "free_bytes", lambda: 9 * 3 * 8 * 8)
    with pytest.raises(CorruptFile):
        seen(files)
