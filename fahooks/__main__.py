"""`python -m fahooks` is the `fahooks` command; `torchrun -m fahooks` needs it."""

import sys

from fahooks.cli import main  # pyright: ignore[reportMissingImports]  (mapped from cli/ by package-dir)

if __name__ == "__main__":
    try:
        main(prog_name="fahooks")
    except SystemExit as leaving:
        distributed = sys.modules.get("fahooks.training.distributed")
        if distributed is not None and distributed.started_by_torchrun() and isinstance(leaving.code, int):
            distributed.leave(leaving.code)
        raise
