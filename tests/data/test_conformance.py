"""The conformance suite on the loaders that ship; and for each check a loader that is broken in its way, which fails it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fahooks.data import Batch, Examples, Files, Images, Loader, MemoryLoader, Share, Stream, TorchvisionLoader, View, conformance
from fahooks.data.decoding import CorruptFile, CorruptFileWarning

Check = Callable[[Loader, Path], None]
LOADERS = {
    "memory": MemoryLoader(),
    "torchvision, 1 worker": TorchvisionLoader(workers=1),
    "torchvision": TorchvisionLoader(workers=3),
}


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", LOADERS)
def test_loaders_that_ship(name: str, check: Check, tmp_path: Path):
    check(LOADERS[name], tmp_path)


class Plain(Stream):
    """A stream of one thread, right in every way, for others to break."""

    def decoded(self, shares: Sequence[Share]) -> Generator[tuple[Share, Tensor]]:
        for share in shares:
            images = [self.read(place) for place in share.index.tolist()]
            if self.framing is None:
                pixels = torch.stack([image for image in images if image is not None])
            else:
                share, pixels = self.framed(share, images, self.epoch)
            yield share, self.augment(pixels, share.index, framed=self.framing is not None)


class Swapped(Plain):
    """Two examples of a batch have exchanged their images."""

    def decoded(self, shares: Sequence[Share]) -> Generator[tuple[Share, Tensor]]:
        for share, pixels in super().decoded(shares):
            yield share, pixels.roll(1, 0)


class OwnOrder(Plain):
    """The order of an epoch is its own."""

    def _shares(self) -> Iterator[Share]:
        return reversed(list(super()._shares()))


class Alone(Plain):
    """Every rank gets all examples, filled up or not."""

    def _shares(self) -> Iterator[Share]:
        view, self.view = self.view, replace(self.view, rank=0, world=1)
        try:
            return iter(list(super()._shares()))
        finally:
            self.view = view


class OtherPixels(Plain):
    """Augmentation is that of another epoch."""

    def augment(self, pixels: Tensor, index: Tensor, *, framed: bool = False) -> Tensor:
        self.epoch += 1
        try:
            return super().augment(pixels, index, framed=framed)
        finally:
            self.epoch -= 1


class OtherLabels(Plain):
    """Two examples of a batch have exchanged their labels."""

    def _batch(self, share: Share, pixels: Tensor) -> Batch:
        batch = super()._batch(share, pixels)
        return replace(batch, labels=batch.labels.roll(1))


class CountsFillers(Plain):
    """What only fills a share up is evaluated as well."""

    def _shares(self) -> Iterator[Share]:
        for share in super()._shares():
            yield replace(share, valid=torch.ones_like(share.valid))


class Uneven(Plain):
    """Shares are not filled up."""

    def _shares(self) -> Iterator[Share]:
        for share in super()._shares():
            yield replace(share, index=share.index[share.valid], valid=share.valid[share.valid])


class Reused(Plain):
    """Batches share one buffer, as FFCV's do on a CPU."""

    buffer: Tensor | None = None

    def _batch(self, share: Share, pixels: Tensor) -> Batch:
        batch = super()._batch(share, pixels)
        if self.buffer is None:
            self.buffer = torch.empty_like(batch.images)
        images = self.buffer[: len(batch.images)].copy_(batch.images)
        return replace(batch, images=images)


class DropsLast(Plain):
    """The last batch is dropped, as FFCV does."""

    def _shares(self) -> Iterator[Share]:
        return iter(list(super()._shares())[:-1])


class LeaksThreads(Plain):
    """Whoever stops early leaves a thread behind."""

    def decoded(self, shares: Sequence[Share]) -> Generator[tuple[Share, Tensor]]:
        threading.Thread(target=OVER.wait, daemon=True).start()
        yield from super().decoded(shares)


class LeaksMemory(Plain):
    """Whoever stops early leaves a batch behind."""

    def __init__(self, examples: Examples, view: View) -> None:
        super().__init__(examples, view)
        self.left: list[Tensor] = []

    def _batch(self, share: Share, pixels: Tensor) -> Batch:
        batch = super()._batch(share, pixels)
        self.left.append(batch.images)
        return batch


class Hangs(Plain):
    """Nobody tells the reader that a step has raised, as in FFCV."""

    def augment(self, pixels: Tensor, index: Tensor, *, framed: bool = False) -> Tensor:
        try:
            return super().augment(pixels, index, framed=framed)
        except ArithmeticError:
            OVER.wait()
            raise


class Swallows(Plain):
    """A step that raises is left out."""

    def augment(self, pixels: Tensor, index: Tensor, *, framed: bool = False) -> Tensor:
        try:
            return super().augment(pixels, index, framed=framed)
        except ArithmeticError:
            return pixels


class Reworded(Plain):
    """A step that raises is reported as something else."""

    def augment(self, pixels: Tensor, index: Tensor, *, framed: bool = False) -> Tensor:
        try:
            return super().augment(pixels, index, framed=framed)
        except ArithmeticError:
            raise RuntimeError("a worker failed") from None


class Unnamed(Plain):
    """Files that can not be decoded are refused without their names."""

    def read(self, place: int) -> Tensor | None:
        try:
            return super().read(place)
        except CorruptFile:
            raise CorruptFile("an image can not be decoded") from None


class LeavesOut(Plain):
    """An example that is skipped does not come at all, and others move up."""

    def framed(self, share: Share, images: Sequence[Tensor | None], epoch: int) -> tuple[Share, Tensor]:
        share, pixels = super().framed(share, images, epoch)
        return replace(share, index=share.index[share.valid], valid=share.valid[share.valid]), pixels[share.valid]


class SkipsBatches(Plain):
    """With a file that is skipped goes all of its batch."""

    def framed(self, share: Share, images: Sequence[Tensor | None], epoch: int) -> tuple[Share, Tensor]:
        share, pixels = super().framed(share, images, epoch)
        return share.only(share.valid.all()), pixels


class BlackBatches(Plain):
    """With a file that is skipped all images of its batch are black, and said to be valid."""

    def framed(self, share: Share, images: Sequence[Tensor | None], epoch: int) -> tuple[Share, Tensor]:
        share, pixels = super().framed(share, images, epoch)
        return share, pixels * share.valid.all()


class Garbage(Plain):
    """What is skipped is not black."""

    def framed(self, share: Share, images: Sequence[Tensor | None], epoch: int) -> tuple[Share, Tensor]:
        share, pixels = super().framed(share, images, epoch)
        pixels[~share.valid] = 7
        return share, pixels


class CountsOwn(Plain):
    """The count of a global batch is without what this rank skipped."""

    def framed(self, share: Share, images: Sequence[Tensor | None], epoch: int) -> tuple[Share, Tensor]:
        share, pixels = super().framed(share, images, epoch)
        return replace(share, count=int(share.valid.sum())), pixels


class Black(Plain):
    """Corrupt JPEGs come out black, as in FFCV."""

    def read(self, place: int) -> Tensor | None:
        view, self.view = self.view, replace(self.view, corrupt="skip")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CorruptFileWarning)
                image = super().read(place)
        finally:
            self.view = view
        return torch.zeros(3, 32, 32, dtype=torch.uint8) if image is None else image


class FromTheStart(Plain):
    """Where it is to go on inside an epoch is not heard."""

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        super().set_epoch(epoch)


class ByReading(Plain):
    """Epochs are counted by reading them, so that a resumed run begins at the first one."""

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        super().set_epoch(self.read_before, start)

    read_before = 0

    def __iter__(self) -> Iterator[Batch]:
        self.read_before += 1
        return super().__iter__()


class ClosesOnce(Plain):
    """Closing it again is an error."""

    closed = False

    def close(self) -> None:
        if self.closed:
            raise RuntimeError("closed already")
        self.closed = True


OVER = threading.Event()

BROKEN = [
    (conformance.same_arrays, Swapped, "has other pixels"),
    (conformance.same_arrays, OwnOrder, "has another index"),
    (conformance.same_arrays, DropsLast, "batches were announced and"),
    (conformance.same_arrays, Alone, "has another index"),
    (conformance.same_arrays, OtherPixels, "has other pixels"),
    (conformance.same_arrays, OtherLabels, "has another labels"),
    (conformance.same_files, Swapped, "has other pixels"),
    (conformance.same_files, OtherPixels, "has other pixels"),
    (conformance.kept_batches_stay, Reused, "is overwritten by a later one"),
    (conformance.evaluates_each_once, DropsLast, "batches were announced and"),
    (conformance.evaluates_each_once, Alone, "not every example is evaluated exactly once"),
    (conformance.evaluates_each_once, CountsFillers, "not every example is evaluated exactly once"),
    (conformance.evaluates_each_once, Uneven, "batches differ in length"),
    (conformance.evaluates_each_once, OtherLabels, "labels are not those of their examples"),
    (conformance.early_breaks_leak_nothing, LeaksThreads, "left 30 threads"),
    (conformance.early_breaks_leak_nothing, LeaksMemory, "left .* MiB"),
    (conformance.a_failing_step_raises, Hangs, "leaves the reader waiting"),
    (conformance.a_failing_step_raises, Swallows, "goes unnoticed"),
    (conformance.a_failing_step_raises, Reworded, "is reported as RuntimeError: a worker failed"),
    (conformance.a_corrupt_file_is_refused, Unnamed, "does not name"),
    (conformance.a_corrupt_file_is_refused, Black, "is fed as if it were whole"),
    (conformance.a_corrupt_file_is_skipped, Black, "no warning names"),
    (conformance.a_corrupt_file_is_skipped, LeavesOut, "changes which examples come"),
    (conformance.a_corrupt_file_is_skipped, SkipsBatches, "exactly the file that is damaged"),
    (conformance.a_corrupt_file_is_skipped, CountsOwn, "changes the count of a batch"),
    (conformance.a_corrupt_file_is_skipped, BlackBatches, "or changes others"),
    (conformance.a_corrupt_file_is_skipped, Garbage, "is not black"),
    (conformance.goes_on_where_it_stopped, FromTheStart, "batches came, where"),
    (conformance.goes_on_where_it_stopped, ByReading, "has another index"),
    (conformance.closes_twice, LeaksThreads, "leaves a thread"),
]


def loader_of(stream: type[Stream]) -> Loader:
    class Broken(Loader):
        def open(self, examples: Examples, view: View) -> Stream:
            return stream(examples, view)

    return Broken()


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_a_loader_of_a_few_lines_conforms(check: Check, tmp_path: Path):
    check(loader_of(Plain), tmp_path)


@pytest.mark.parametrize(("check", "stream", "message"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_controls(check: Check, stream: type[Stream], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(conformance, "SECONDS_TO_RAISE", 0.5)
    OVER.clear()
    try:
        with pytest.raises(AssertionError, match=message):
            check(loader_of(stream), tmp_path)
    finally:
        OVER.set()


def test_control_of_closing_twice(tmp_path: Path):
    with pytest.raises(RuntimeError, match="closed already"):
        conformance.closes_twice(loader_of(ClosesOnce), tmp_path)


def test_every_check_has_a_control():
    assert {check for check, *_ in BROKEN} == set(conformance.CHECKS)


def test_pixels_of_files_may_be_left_to_the_loader(tmp_path: Path):
    conformance.same_files(loader_of(Swapped), tmp_path, exact=False)
    with pytest.raises(AssertionError, match="another index"):
        conformance.same_files(loader_of(OwnOrder), tmp_path, exact=False)


def test_examples_of_the_suite_are_no_trivial_ones(tmp_path: Path):
    arrays, files = conformance._arrays(60), conformance._files(tmp_path, 30)
    assert isinstance(arrays.source, Images) and isinstance(files.source, Files)
    assert not torch.equal(arrays.places, torch.arange(60)), "places in the split are not those in the source"
    assert len({files.source.read(n).shape for n in range(30)}) == 30
