"""`python -m fahooks` is the `fahooks` command; `torchrun -m fahooks` needs it."""

from fahooks.cli import main  # pyright: ignore[reportMissingImports]  (mapped from cli/ by package-dir)

if __name__ == "__main__":
    main(prog_name="fahooks")
