"""Being asked to stop: Ctrl-C, the SIGTERM that clusters send, and the SIGHUP of a terminal that was closed."""

from __future__ import annotations

import signal
import threading
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A run was asked to stop, and is at a place where it can be saved; the message says how to go on."""


class Stop:
    """Notes that the process was asked to stop, so that what is under way can be finished and saved.

    A second request is not waited for: it raises KeyboardInterrupt on the spot. Signals that the process ignores, as those of
    `nohup`, stay ignored, and outside of the main thread, where Python hands no signal out, nothing is noted.

    Attributes:
        requested: whether it was asked.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
