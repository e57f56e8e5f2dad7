"""The `torchvision` loader: threads decode the files of torchvision's ImageFolder."""

from __future__ import annotations

from fahooks.data.examples import Examples
from fahooks.data.loader import Loader, View
from fahooks.data.threads import ThreadedStream, own_cores
from fahooks.plugins import InputError, loaders


@loaders.register("torchvision", summary="threads decode image files while the network works")
class TorchvisionLoader(Loader):
    """Threads decode image files while the network works.

    Arguments:
        workers: how many threads; None for one a core that this process may use, up to 16.

    Raises:
        InputError: `workers` is not positive.
    """

    def __init__(self, *, workers: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise InputError(f"workers must be positive (got {workers})")
        self.workers = workers or own_cores()

    def open(self, examples: Examples, view: View) -> ThreadedStream:
        """A stream over `examples`."""
        return ThreadedStream(examples, view, workers=self.workers)
