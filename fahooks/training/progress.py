"""What a person sees of a run: a live bar on a terminal, one line an epoch anywhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fahooks.terminal import on_terminal


class Display:
    """A progress bar over the steps of a run where `console` writes to a terminal, and plain lines.

    Arguments:
        title: the name of what runs; its last part is shown.
        console: where to show it.
        steps: how many there are.
        done: how many of them an earlier sitting took.
    """

    def __init__(self, title: str, console: Console, *, steps: int, done: int = 0) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("{task.description}"),
            TextColumn("epoch {task.fields[epoch]} loss {task.fields[loss]:.3f} error {task.fields[error]:.2f} %"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[speed]:,.0f} images/s"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not on_terminal(console.file),
            transient=True,
            expand=True,
        )
        self.task = self.bar.add_task(
            title.rpartition("/")[2], total=steps, completed=done, epoch="-", loss=0.0, error=0.0, speed=0.0
        )

    def __enter__(self) -> Display:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def step(self, done: int, **fields: Any) -> None:
        """Move the bar to step `done` and show epoch, loss, error (percent) and speed (images a second)."""
        self.bar.update(self.task, completed=done, **fields)

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
