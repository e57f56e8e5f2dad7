"""`fahooks doctor`: what this machine has for training."""

from __future__ import annotations

import sys

import click
from rich.console import Console
from rich.text import Text

from .stopping import importing

STYLES = {"ok": "green", "absent": "yellow", "missing": "bold red"}


@click.command(epilog="Example: fahooks doctor")
@importing()
def doctor() -> None:
    """Say what this machine has for training, what is missing, and what installs it.

    A line each: ok; missing, where training needs it; absent, where it only makes training better. Exit code 1 if something is
    missing, else 0.
    """
    from fahooks.diagnosis import examine

    findings = examine()
    width = max(len(finding.name) for finding in findings)
    console = Console(soft_wrap=True)
    for finding in findings:
        line = Text.assemble(f"{finding.name:<{width}}  ", (f"{finding.state:<7}", STYLES[finding.state]), f"  {finding.found}")
        console.print(line.append(f" -> {finding.remedy}" if finding.remedy else "", style="bold"))
    sys.exit(int(any(finding.state == "missing" for finding in findings)))
