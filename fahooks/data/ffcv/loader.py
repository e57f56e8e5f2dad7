"""The `ffcv` loader: batches decoded from .beton files."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event
from typing import Literal

import numpy
import torch
from torch import Tensor

from fahooks.data.datasets import default_root
from fahooks.data.decoding import CorruptFile
from fahooks.data.examples import Examples, Files, Images
from fahooks.data.ffcv import library
from fahooks.data.ffcv.beton import JPG, Beton, read
from fahooks.data.ffcv.writing import FORMAT, Mode, Packing, is_whole, skipped, write
from fahooks.data.loader import Loader, View
from fahooks.data.order import Share
from fahooks.data.threads import ThreadedStream, own_cores
from fahooks.plugins import InputError, loaders


class FfcvStream(ThreadedStream):
    """Batches decoded from a .beton file by threads.

    Where whole images of one size are seen, a compiled kernel decodes a batch at a time. Where boxes are, each image is decoded
    and its box cut out as every loader does it.

    Arguments:
        file: where the images of the source lie.
        workers: how many threads.
    """

    def __init__(self, examples: Examples, view: View, *, file: Beton, workers: int) -> None:
        super().__init__(examples, view, workers=workers)
        self.file = file
        self.places = examples.places.numpy()
        absent = file.size[self.places] == 0
        if view.corrupt == "refuse" and absent.any():
            raise self._corrupt(int(absent.argmax()))
        self.size = self._one_size()

    def read(self, place: int) -> Tensor | None:
        """The example at `place`, uint8 [C, H, W] of its own size; None if it is corrupt and such are skipped."""
        file, at = self.file, self.places[place]
        height, width = int(file.height[at]), int(file.width[at])
        image = None
        if file.size[at] and file.mode[at] == JPG:
            image = library.decode_jpeg(file.packed(at), height, width)
        elif file.size[at]:
            image = file.packed(at).reshape(height, width, -1)
        if image is None:
            self.skip(self._corrupt(place))
            return None
        return torch.from_numpy(image[:, :, : self.examples.shape[0]]).permute(2, 0, 1)

    def _one_size(self) -> tuple[int, int] | None:
        """Height and width of the images, where they all have the same and are seen whole; else None."""
        here = self.places[self.file.size[self.places] > 0]
        sizes = numpy.unique(numpy.stack([self.file.height[here], self.file.width[here]]), axis=1)
        if sizes.shape[1] != 1:
            return None
        height, width = map(int, sizes[:, 0])
        if self.framing is not None:
            whole = torch.tensor([[0, 0, height, width]])
            drawn = self.view.training and self.framing.random
            if drawn or not (height == width == self.framing.size and torch.equal(self.framing.evaluate(whole[:, 2:]), whole)):
                return None
        return height, width

    def _load(self, share: Share, epoch: int, stopped: Event) -> tuple[Share, Tensor]:
        if self.size is None:
            return super()._load(share, epoch, stopped)
        from fahooks.data.ffcv.kernel import decode  # numba takes a second to import

        shape = (len(share.index), *self.size, self.examples.shape[0])
        pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=self.labels.is_cuda)
        good = decode(self.file, self.places[share.index.numpy()], pixels.numpy())
        if not good.all():
            for place in share.index[torch.from_numpy(~good)].tolist():
                self.skip(self._corrupt(place))
            share = share.only(torch.from_numpy(good))
        return share, pixels.permute(0, 3, 1, 2)

    def _corrupt(self, place: int) -> CorruptFile:
        """What is wrong with the example at `place`."""
        at, source = int(self.places[place]), self.examples.source
        if not self.file.size[at]:
            return _absent(source, at)
        return CorruptFile(f"{_image(source, at)} in {self.file.path} is damaged: remove that file, and it is written anew")


@loaders.register(
    "ffcv",
    summary="threads decode images from a .beton file, which is written once: the fastest for what does not fit in memory",
    paper="Leclerc et al. 2023, https://arxiv.org/abs/2306.12517",
)
class FfcvLoader(Loader):
    """Threads decode images from a .beton file, which is written once.

    Arguments:
        folder: where .beton files are; None for `ffcv` in the folder of datasets, data.root.
        mode: how images are packed: "raw" pixels, "jpg", or "proportion", some of each; None for raw where images are arrays, and
            jpg where they are files.
        quality: of JPEG compression, 1 to 100; JPEG files that are not scaled are taken as they are.
        proportion: which fraction of the images becomes JPEG under mode "proportion".
        max_side: images with a longer side are scaled down to this many pixels when they are written; None for no limit.
        shorter_side: images whose shorter side is longer are scaled down to this many pixels; None for no limit.
        workers: how many threads; None for one a core that this process may use, up to 16.

    Raises:
        InputError: an option is out of its range.
    """

    def __init__(
        self,
        *,
        folder: str | None = None,
        mode: Mode | None = None,
        quality: int = 90,
        proportion: float = 0.5,
        max_side: int | None = None,
        shorter_side: int | None = None,
        workers: int | None = None,
    ) -> None:
        if workers is not None and workers < 1:
            raise InputError(f"workers must be positive (got {workers})")
        self.folder = Path(folder or Path(default_root(), "ffcv")).expanduser()
        self.mode = mode
        self.packing = Packing(mode or "raw", quality, proportion, max_side, shorter_side)
        self.workers = workers or own_cores()
        self._hashes: dict[int, tuple[Images | Files, str]] = {}

    @classmethod
    def available(cls) -> str | None:
        """None where FFCV works; else a sentence that says why not, with the line that installs what is missing."""
        return library.missing()

    def path(self, examples: Examples) -> Path:
        """The .beton file of all images of `examples.source`; its name holds the first digits of `hash`."""
        return self.folder / f"{examples.name.replace('/', '-')}-{self.hash(examples.source)[:12]}.beton"

    def hash(self, source: Images | Files) -> str:
        """What decides whether a file is that of `source`: a hash of its images, and of how they are packed."""
        known, digest = self._hashes.get(id(source), (None, ""))
        if known is not source:
            key = repr((FORMAT, source.fingerprint(), tuple(asdict(self._packing(source)).items())))
            digest = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
            self._hashes[id(source)] = (source, digest)
        return digest

    def prepare(self, examples: Examples, *, corrupt: Literal["refuse", "skip"] = "refuse") -> None:
        """Write the .beton file of `examples.source`, unless it is there.

        Raises:
            CorruptFile: an image can not be decoded, or could not when the file was written, and such are refused.
            InputError: the folder can not be written.
            Failed: writing failed midway, of a full disk for one.
        """
        source = examples.source
        path, digest = self.path(examples), self.hash(source)
        if not is_whole(path, digest):
            packing = self._packing(source)
            write(path, examples.name, source, packing, digest=digest, workers=self.workers, corrupt=corrupt)
        if corrupt == "refuse" and (absent := skipped(path)):  # when it was written they were not refused
            more = f", and {len(absent) - 1:,} more" if len(absent) > 1 else ""
            raise _absent(source, absent[0], more)

    def open(self, examples: Examples, view: View) -> FfcvStream:
        """A stream over `examples`.

        Raises:
            CorruptFile: an image could not be decoded when the file was written, and such are refused.
            InputError: the file is not there, or damaged.
        """
        path = self.path(examples)
        if not path.is_file():
            raise InputError(f"{path} is not there: `fahooks data prepare` with the same recipe writes it, and so does a run")
        file = read(path, channels=examples.shape[0])
        if len(file) != len(examples.source):
            raise InputError(f"{path} has {len(file):,} images instead of {len(examples.source):,}: remove it")
        return FfcvStream(examples, view, file=file, workers=self.workers)

    def _packing(self, source: Images | Files) -> Packing:
        return self.packing if self.mode or isinstance(source, Images) else replace(self.packing, mode="jpg")


def _absent(source: Images | Files, at: int, more: str = "") -> CorruptFile:
    """That there was no image at a place of the source when the .beton file was written."""
    return CorruptFile(f"{_image(source, at)} could not be decoded{more}: replace or remove it")


def _image(source: Images | Files, at: int) -> str:
    return f"image {at}, from {source.paths[at]}," if isinstance(source, Files) else f"image {at}"
