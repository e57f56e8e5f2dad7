"""Writing .beton files: threads pack images, one thread writes them in their order, and a whole file appears at once.

Equal images and options give equal files, byte for byte.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy
import torch.nn.functional as F
from torch import Tensor

from fahooks.data.decoding import CorruptFile
from fahooks.data.examples import Files, Images
from fahooks.data.ffcv.beton import (
    ALLOCATION,
    COLOR,
    CUSTOM,
    EXAMPLE,
    FIELD,
    HEADER,
    INTEGER,
    JPG,
    METADATA_AT,
    PAGE,
    RAW,
    VERSION,
)
from fahooks.data.ffcv.library import decode_jpeg
from fahooks.data.order import shuffled
from fahooks.plugins import Failed, InputError
from fahooks.terminal import on_terminal

# Of what is written here; another number makes all files be written anew.
FORMAT = 1
Mode = Literal["raw", "jpg", "proportion"]


@dataclass(frozen=True)
class Packing:
    """How images are packed.

    Arguments:
        mode: "raw" pixels, "jpg", or "proportion": some raw and some as JPEG.
        quality: of JPEG compression, 1 to 100. A file that is a JPEG already, and not scaled, is taken as it is.
        proportion: which fraction of the images becomes JPEG under mode "proportion".
        max_side: images with a longer side are scaled down to this many pixels; None for no limit.
        shorter_side: images whose shorter side is longer than this are scaled down to it; None for no limit.

    Raises:
        InputError: an option is out of its range.
    """

    mode: Mode = "raw"
    quality: int = 90
    proportion: float = 0.5
    max_side: int | None = None
    shorter_side: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("raw", "jpg", "proportion"):
            raise InputError(f"mode must be raw, jpg or proportion (got {self.mode!r})")
        if not 1 <= self.quality <= 100:
            raise InputError(f"quality must be 1 to 100 (got {self.quality})")
        if not 0 <= self.proportion <= 1:
            raise InputError(f"proportion must be 0 to 1 (got {self.proportion})")
        for name in ("max_side", "shorter_side"):
            side = getattr(self, name)
            if side is not None and not 1 <= side < 2**16:
                raise InputError(f"{name} must be 1 to 65535 (got {side})")

    def scaled(self, height: int, width: int) -> tuple[int, int]:
        """The size that an image of `height` x `width` is written in."""
        scale = min(1.0, (self.max_side or height + width) / max(height, width))
        scale = min(scale, (self.shorter_side or height + width) / min(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))


@dataclass(frozen=True)
class Packed:
    """An image as it is written; of no bytes where it can not be decoded."""

    mode: int
    height: int
    width: int
    data: bytes


def write(
    path: Path,
    name: str,
    source: Images | Files,
    packing: Packing,
    *,
    digest: str,
    workers: int,
    corrupt: Literal["refuse", "skip"],
) -> None:
    """Write `source` to `path`, with what is known of it in `path` + ".json".

    Whatever ends it, SIGKILL too, `path` is whole or not there. A second process that writes the same file waits for the first,
    and leaves what that one wrote; only who holds the file that others wait for removes one that is not whole.

    Arguments:
        path: the file; its folder is made.
        name: what messages call the source.
        source: the images.
        packing: how they are packed.
        digest: what the file is recognised by.
        workers: how many threads decode and compress.
        corrupt: whether an image that can not be decoded ends it, or becomes an image of no bytes.

    Raises:
        CorruptFile: an image can not be decoded; the message names it.
        InputError: the folder can not be written.
        Failed: writing failed midway, of a full disk for one.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _held(partial)
    except OSError as error:
        raise InputError(
            f"{path} can not be written ({error.strerror}): set data.loader_options.folder or data.root to a folder that can"
        ) from error
    with file:
        if is_whole(path, digest):  # another process wrote it while this one waited
            partial.unlink()
            return
        try:
            path.unlink(missing_ok=True)  # now, as both may find no room
            with partial.open("w+b") as whole:
                absent = _write(whole, name, source, packing, workers, corrupt)
                whole.flush()
                os.fsync(whole.fileno())
                about = {"name": name, "images": len(source), "corrupt": absent, "bytes": whole.tell(), "hash": digest}
            _replace(sidecar(path), json.dumps({"format": FORMAT, **about, **asdict(packing)}, indent=1) + "\n")
            partial.replace(path)
        except BaseException as error:  # not otherwise: what has this name once it has been renamed is another process's
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise Failed(f"{path} could not be written: {error.strerror or error}") from error
            raise


def _held(partial: Path) -> IO[bytes]:
    """The file at `partial`, which other processes wait for until it is closed."""
    while True:
        file = partial.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(file.fileno()), partial.stat()):
                return file
        except FileNotFoundError:
            pass  # who had it before has renamed or removed it, and the next one makes another
        except BaseException:
            file.close()
            raise
        file.close()


def sidecar(path: Path) -> Path:
    """Where it is kept what is known of a .beton file."""
    return path.with_name(path.name + ".json")


def is_whole(path: Path, digest: str) -> bool:
    """Whether a file is there, is the one of that hash, and is as long as it was when it was written."""
    try:
        known = _known(path)
        return (path.stat().st_size, digest) == (known["bytes"], known["hash"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def skipped(path: Path) -> list[int]:
    """The places of the images of a whole file that could not be decoded when it was written."""
    return _known(path)["corrupt"]


def _known(path: Path) -> dict[str, Any]:
    return json.loads(sidecar(path).read_text())


def _write(
    file: IO[bytes], name: str, source: Images | Files, packing: Packing, workers: int, corrupt: Literal["refuse", "skip"]
) -> list[int]:
    """Write all into `file`, and leave it at its end. Returns the places of corrupt images."""
    count = len(source)
    examples = numpy.zeros(count, EXAMPLE)
    examples["label"] = source.labels.numpy()
    allocated: list[tuple[int, int, int]] = []
    absent: list[int] = []
    end = -(-(METADATA_AT + examples.nbytes) // PAGE) * PAGE
    with _shown(name, count) as advance, closing_all(_packed(source, packing, workers, corrupt)) as packed:
        for place, image in enumerate(packed):
            left = -end % PAGE
            if len(image.data) > left > 0:
                end += left
            if image.data:
                file.seek(end)
                file.write(image.data)
                allocated.append((place, end, len(image.data)))
            else:
                absent.append(place)
            examples["image"][place] = (image.mode, image.width, image.height, end)
            end += len(image.data)
            advance(place + 1)
    end += -end % PAGE
    gray = source.shape[0] == 1
    fields = numpy.zeros(2, FIELD)
    for field, (title, kind) in zip(fields, (("image", CUSTOM if gray else COLOR), ("label", INTEGER)), strict=True):
        field["type_id"] = kind
        field["name"][: len(title)] = numpy.frombuffer(title.encode(), numpy.uint8)
    header = numpy.zeros(1, HEADER)
    header[0] = (VERSION, len(fields), PAGE, count, end)
    file.seek(0)
    file.write(header.tobytes() + fields.tobytes() + examples.tobytes())
    file.seek(end)
    file.write(numpy.array(allocated, ALLOCATION).tobytes())
    return absent


@contextmanager
def closing_all(packed: Generator[Packed]) -> Iterator[Generator[Packed]]:
    """Close a generator whatever happens, so that its threads end."""
    try:
        yield packed
    finally:
        packed.close()


def _packed(source: Images | Files, packing: Packing, workers: int, corrupt: Literal["refuse", "skip"]) -> Generator[Packed]:
    """All images of `source`, packed by threads, in their order."""
    modes = numpy.full(len(source), RAW if packing.mode == "raw" else JPG)
    if packing.mode == "proportion":
        modes[shuffled(len(source), "beton")[round(packing.proportion * len(source)) :].numpy()] = RAW
    pool = ThreadPoolExecutor(workers, thread_name_prefix="fahooks-write")
    waiting: deque[Future[Packed]] = deque()
    try:
        for place in range(len(source)):
            waiting.append(pool.submit(_pack, source, place, int(modes[place]), packing, corrupt))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _pack(source: Images | Files, place: int, mode: int, packing: Packing, corrupt: Literal["refuse", "skip"]) -> Packed:
    if mode == JPG and isinstance(source, Files) and (taken := _taken_over(source, place, packing)):
        return taken
    try:
        image = source.read(place)
    except CorruptFile:
        if corrupt == "refuse":
            raise
        return Packed(RAW, 0, 0, b"")
    height, width = image.shape[1:]
    if max(height, width) >= 2**16:
        raise InputError(f"image {place} has {height}x{width} pixels, and .beton files hold 65535 a side: set max_side")
    if (size := packing.scaled(height, width)) != (height, width):
        image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    return Packed(mode, *size, _jpeg(image, packing.quality) if mode == JPG else image.permute(1, 2, 0).numpy().tobytes())


def _taken_over(source: Files, place: int, packing: Packing) -> Packed | None:
    """A file as it is; None if it is no JPEG, is to be scaled, or is one that FFCV's decoder has anything to say against."""
    from PIL import Image

    try:
        data = Path(source.paths[place]).read_bytes()
        with Image.open(io.BytesIO(data)) as file:
            kind, channels, (width, height) = file.format, len(file.getbands()), file.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    if kind != "JPEG" or packing.scaled(height, width) != (height, width) or channels > source.channels:
        return None
    whole = decode_jpeg(numpy.frombuffer(data, numpy.uint8), height, width) is not None
    return Packed(JPG, height, width, data) if whole else None


def _jpeg(image: Tensor, quality: int) -> bytes:
    """An image uint8 [C, H, W] as a JPEG file."""
    from PIL import Image

    pixels = image.permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


@contextmanager
def _shown(name: str, count: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, elsewhere a line every ten seconds; on standard error, as the output is for results."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    title = f"writing {name}"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    started = last = time.monotonic()

    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    def advance(done: int) -> None:
        nonlocal last
        bar.update(task, completed=done)
        if bar.disable and time.monotonic() - last > 10:
            last = time.monotonic()
            line(f"{title}: {done:,} of {count:,} images")

    with Progress(*columns, console=console, disable=not on_terminal(sys.stderr), transient=True) as bar:
        task = bar.add_task(title, total=count)
        yield advance
    line(f"wrote {name}: {count:,} images in {time.monotonic() - started:.1f} s")
