"""What every loader must do, as functions that a test calls. Each raises AssertionError where a loader does not.

A plugin's test of its own loader is three lines:

    @pytest.mark.parametrize("check", fahooks.data.conformance.CHECKS, ids=lambda check: check.__name__)
    def test_my_loader(check, tmp_path):
        check(MyLoader(), tmp_path)

Checks are given a loader and an empty folder to write into. They compare with the memory loader, which is the reference, and say
what is wrong in a sentence. A loader that keeps files as they are (`exact=False` where a check has that argument) may differ in
pixels where JPEG is decoded and scaled by other code, but in nothing else.
"""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fahooks.data.augmentation import Augment, Augmentation
from fahooks.data.decoding import CorruptFile, CorruptFileWarning
from fahooks.data.draw import Draw
from fahooks.data.examples import Examples, Files, Images
from fahooks.data.loader import Batch, Loader, Stream, View
from fahooks.data.memory import MemoryLoader

AUGMENT = [{"crop": {"padding": 4}}, {"flip": {}}, {"cutout": {"size": 8}}]
FRAMED = [{"random_resized_crop": {"size": 24}}, {"flip": {}}]
SECONDS_TO_RAISE = 5.0
EARLY_BREAKS = 30


def same_arrays(loader: Loader, folder: Path) -> None:
    """Arrays come with the indices, labels and pixels of the reference: all epochs, seeds, augmentations, channels and ranks."""
    for channels in (3, 1):
        examples = _arrays(60, channels)
        for steps in ([], AUGMENT, FRAMED):
            for training in (True, False):
                view = _view(channels, training=training, augment=Augment(steps, seed=5), seed=5)
                for epoch, rank, world in ((0, 0, 1), (3, 1, 2)):
                    _assert_as_reference(loader, examples, replace(view, rank=rank, world=world), epoch)


def same_files(loader: Loader, folder: Path, exact: bool = True) -> None:
    """Files of many sizes come with the indices and labels of the reference, and with its pixels if `exact`."""
    examples = _files(folder, 30)
    for steps in ([], AUGMENT, FRAMED, [{"center_crop": {"size": 20, "resize": 24}}]):
        for training in (True, False):
            view = _view(3, training=training, augment=Augment(steps, seed=5), seed=5)
            _assert_as_reference(loader, examples, view, 2, exact=exact)


def kept_batches_stay(loader: Loader, folder: Path) -> None:
    """No batch is overwritten by a later one."""
    with _opened(loader, _arrays(400), _view(3, batch_size=20)) as stream:
        kept = [(batch, batch.images.clone(), batch.labels.clone(), batch.index.clone()) for batch in stream]
        for batch, *copies in kept:
            for tensor, copy in zip((batch.images, batch.labels, batch.index), copies, strict=True):
                assert torch.equal(tensor, copy), "a batch that was kept is overwritten by a later one"


def evaluates_each_once(loader: Loader, folder: Path) -> None:
    """9,999 examples on two ranks: each is evaluated once, and both ranks have equally many batches, as long as each other."""
    examples = _arrays(9999, size=8)
    by_rank = []
    for rank in range(2):
        with _opened(loader, examples, _view(3, training=False, batch_size=500, rank=rank, world=2)) as stream:
            by_rank.append([(b.index, b.valid.cpu(), b.labels.cpu(), b.count) for b in stream])
            assert len(by_rank[-1]) == len(stream), f"{len(stream)} batches were announced and {len(by_rank[-1])} came"
    lengths = [[len(index) for index, *_ in batches] for batches in by_rank]
    assert lengths[0] == lengths[1], "the ranks' batches differ in length"
    seen = torch.cat([index[valid] for batches in by_rank for index, valid, *_ in batches])
    assert torch.equal(seen.sort().values, torch.arange(9999)), "not every example is evaluated exactly once"
    labels = torch.cat([labels[valid] for batches in by_rank for _, valid, labels, _ in batches])
    assert torch.equal(labels, examples.labels[seen]), "labels are not those of their examples"
    assert sum(count for *_, count in by_rank[0]) == 9999, "the counts of global batches do not add up to the examples"


def early_breaks_leak_nothing(loader: Loader, folder: Path) -> None:
    """Thirty readers that stop after a batch leave no thread and no memory behind."""
    examples = _files(folder, 40, side=200)
    with _opened(loader, examples, _view(3, batch_size=10)) as stream:
        for _ in range(3):
            _one(stream)
        before, held = _threads(), _resident()
        for _ in range(EARLY_BREAKS):
            _one(stream)
        after = _settled(before)
        grown = (_resident() - held) / 2**20
    assert after <= before, f"{EARLY_BREAKS} readers that stopped early left {after - before} threads"
    # A batch of ten images of 200x200 is 1.1 MiB, and as float32 4.6: what leaks one a reader leaks more than this.
    assert grown < 24, f"{EARLY_BREAKS} readers that stopped early left {grown:.0f} MiB"


def a_failing_step_raises(loader: Loader, folder: Path) -> None:
    """What an augmentation raises reaches the reader, within seconds, and the stream can be closed after it."""

    class Fails(Augmentation):
        def train(self, pixels: Tensor, draw: Draw) -> Tensor:
            raise ArithmeticError("this step fails")

    augment = Augment()
    augment.steps.append(Fails())
    raised: list[BaseException] = []

    def read() -> None:
        try:
            with _opened(loader, _arrays(200), _view(3, augment=augment)) as stream:
                list(stream)
        except BaseException as error:
            raised.append(error)

    reader = threading.Thread(target=read, daemon=True)
    started = time.monotonic()
    reader.start()
    reader.join(SECONDS_TO_RAISE)
    assert not reader.is_alive(), f"a step that raises leaves the reader waiting for {time.monotonic() - started:.0f} s and more"
    assert raised, "a step that raises goes unnoticed"
    said = f"{type(raised[0]).__name__}: {raised[0]}"
    assert "this step fails" in said, f"a step that raises ArithmeticError('this step fails') is reported as {said}"


def a_corrupt_file_is_refused(loader: Loader, folder: Path) -> None:
    """A JPEG that ends too early is named in an InputError, where such are refused."""
    examples, damaged = _damaged(folder)
    try:
        with _opened(loader, examples, _view(3)) as stream:
            list(stream)
    except CorruptFile as error:
        assert damaged in str(error), f"the message does not name {damaged}: {error}"
        return
    raise AssertionError("a JPEG that ends too early is fed as if it were whole")


def a_corrupt_file_is_skipped(loader: Loader, folder: Path, exact: bool = True) -> None:
    """A JPEG that ends too early is named in a warning, black and not valid, where such are skipped; the others come."""
    examples, damaged = _damaged(folder)
    for steps in ([], FRAMED):
        for training in (True, False):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                view = _view(3, training=training, augment=Augment(steps), corrupt="skip")
                with _opened(loader, examples, view) as stream:
                    batches = list(stream)
            named = [str(w.message) for w in caught if issubclass(w.category, CorruptFileWarning)]
            assert any(damaged in message for message in named), f"no warning names {damaged}"
            index, valid = torch.cat([b.index for b in batches]), torch.cat([b.valid.cpu() for b in batches])
            assert torch.equal(index.sort().values, torch.arange(len(examples))), "a skipped file changes which examples come"
            assert index[~valid].tolist() == [DAMAGED], "exactly the file that is damaged must not be valid"
            # Whoever skips a file can not know what other ranks skip.
            assert [b.count for b in batches] == [len(b.index) for b in batches], "a skipped file changes the count of a batch"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CorruptFileWarning)
                with _opened(MemoryLoader(), examples, view) as stream:
                    reference = list(stream)
            for one, other in zip(batches, reference, strict=True):
                same = torch.ones_like(one.valid) if exact else ~one.valid
                assert torch.equal(one.images[same], other.images[same]), "a skipped file is not black, or changes others"


def goes_on_where_it_stopped(loader: Loader, folder: Path) -> None:
    """A stream that is opened at an epoch, or inside one, gives what one that came there by itself gives."""
    examples, view = _arrays(70), _view(3, augment=Augment(AUGMENT))
    with _opened(loader, examples, view) as stream:
        by_epoch = []
        for epoch in range(3):
            stream.set_epoch(epoch)
            by_epoch.append(list(stream))
    for epoch, start in ((2, 0), (1, 3), (1, len(by_epoch[1]))):
        with _opened(loader, examples, view) as again:
            again.set_epoch(epoch, start)
            _assert_same(list(again), by_epoch[epoch][start:], exact=True)


def closes_twice(loader: Loader, folder: Path) -> None:
    """A stream may be closed twice, also in the middle of an epoch, and leaves no thread."""
    before = _threads()
    stream = _opened(loader, _arrays(100), _view(3))
    batches = iter(stream)
    next(batches)
    stream.close()
    stream.close()
    assert _settled(before) <= before, "a closed stream leaves a thread"
    assert next(batches, None) is None, "a closed stream goes on with its epoch"


CHECKS: list[Callable[[Loader, Path], None]] = [
    same_arrays,
    same_files,
    kept_batches_stay,
    evaluates_each_once,
    early_breaks_leak_nothing,
    a_failing_step_raises,
    a_corrupt_file_is_refused,
    a_corrupt_file_is_skipped,
    goes_on_where_it_stopped,
    closes_twice,
]

DAMAGED = 7


def _view(channels: int, *, training: bool = True, batch_size: int = 16, **options: object) -> View:
    mean, std = torch.full((channels,), 3.0), torch.full((channels,), 2.0)
    return View(**{"batch_size": batch_size, "training": training, "mean": mean, "std": std, **options})  # type: ignore[arg-type]


def _opened(loader: Loader, examples: Examples, view: View) -> Stream:
    loader.prepare(examples, corrupt=view.corrupt)
    return loader.open(examples, view)


def _arrays(count: int, channels: int = 3, size: int = 32) -> Examples:
    """Noise, in an order of its own, so that a place in the source is not mistaken for one in the split."""
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count + 10, channels, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 1000, (count + 10,), generator=generator)
    return Examples("conformance/train", Images(pixels, labels), torch.randperm(count + 10, generator=generator)[:count])


def _files(folder: Path, count: int, side: int = 32) -> Examples:
    """JPEGs of as many sizes."""
    import numpy
    from PIL import Image

    generator = numpy.random.default_rng(0)
    paths = [str(folder / f"{number:03}.jpg") for number in range(count)]
    for number, path in enumerate(paths):
        coarse = generator.integers(0, 256, (6, 7, 3), dtype=numpy.uint8)
        Image.fromarray(coarse).resize((side + number, side + count - number), Image.Resampling.BICUBIC).save(path, quality=95)
    return Examples("conformance/train", Files(paths, torch.arange(count) % 10, side), torch.arange(count).flip(0))


def _damaged(folder: Path) -> tuple[Examples, str]:
    examples = _files(folder, 16)
    assert isinstance(examples.source, Files)
    path = Path(examples.source.paths[int(examples.places[DAMAGED])])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return examples, str(path)


def _one(stream: Stream) -> None:
    for _ in stream:
        break


def _assert_as_reference(loader: Loader, examples: Examples, view: View, epoch: int, exact: bool = True) -> None:
    read: list[list[Batch]] = []
    for each in (loader, MemoryLoader()):
        with _opened(each, examples, view) as stream:
            stream.set_epoch(epoch)
            read.append(list(stream))
            assert len(read[-1]) == len(stream), f"{len(stream)} batches were announced and {len(read[-1])} came"
    _assert_same(*read, exact=exact)


def _assert_same(ours: list[Batch], theirs: list[Batch], exact: bool) -> None:
    assert len(ours) == len(theirs), f"{len(ours)} batches came, where {len(theirs)} should"
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert one.images.dtype == torch.float32 and one.labels.dtype == torch.int64 and one.valid.dtype == torch.bool
        for name in ("index", "labels", "valid"):
            assert torch.equal(getattr(one, name), getattr(other, name)), f"batch {number} has another {name}"
        assert one.count == other.count, f"batch {number} counts {one.count} examples of the global batch, not {other.count}"
        assert one.images.shape == other.images.shape, f"batch {number} has images of shape {tuple(one.images.shape)}"
        assert not exact or torch.equal(one.images, other.images), f"batch {number} has other pixels"


def _threads() -> int:
    """Threads of this process, those that Python does not know of as well."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else threading.active_count()


def _settled(at_most: int) -> int:
    """How many threads there are, after what ends had a second to do so."""
    for _ in range(20):
        if _threads() <= at_most:
            break
        time.sleep(0.05)
    return _threads()


def _resident() -> int:
    """Bytes of memory that this process needs; 0 where the system does not say."""
    gc.collect()
    # Memory that was freed but not given back would hide a leak, which fills it first.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
