"""`python -m fahooks` is the `fahooks` command; `torchrun -m fahooks` needs it."""

from fahooks.cli import main  # pyright: ignore[reportMissingImports]  (mapped from cli/ by package-dir)
from fahooks.training.torchrun import leave, started_by_torchrun

if __name__ == "__main__":
    try:
        main(prog_name="fahooks")
    except SystemExit as leaving:
        if started_by_torchrun() and isinstance(leaving.code, int):
            leave(leaving.code)
        raise
