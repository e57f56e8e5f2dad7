"""The `fahooks` command: a group whose commands are imported only when they run."""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Any

import click

from fahooks.plugins import Failed, InputError, near

from .pipes import readers_may_leave

# Name -> module and first line of the help, which `fahooks --help` prints without importing the command.
COMMANDS = {
    "bench": ("fahooks.cli.bench", "Measure what a rule, or the training loop, costs."),
    "convert": ("fahooks.cli.convert", "Convert MODEL, with random weights, to feedback alignment and verify it."),
    "cp": ("fahooks.cli.cp", "Copy the shipped RECIPE (`fahooks ls recipes`) to the new FILE, to edit it."),
    "data": ("fahooks.cli.data", "Write what the loader of a recipe reads, and compare how fast loaders are."),
    "doctor": ("fahooks.cli.doctor", "Say what this machine has for training, what is missing, and what installs it."),
    "eval": ("fahooks.cli.eval", "Print the validation and test error of the run in the directory RUN."),
    "ls": ("fahooks.cli.ls", "List what has a name, with its options and their defaults."),
    "quickstart": ("fahooks.cli.train", "Train bp, fa and usf_sn on real digits, on a CPU in about a minute, and compare them."),
    "reproduce": ("fahooks.cli.reproduce", "Train what is missing of the paper's Table 1, and set ours beside the paper's."),
    "show": ("fahooks.cli.show", "Print RECIPE with its bases, every default and where each value comes from."),
    "train": ("fahooks.cli.train", "Train RECIPE: the name of a shipped recipe (`fahooks ls recipes`) or a file."),
    "validate": ("fahooks.cli.validate", "Check recipes, all shipped ones where none is named, and say what is wrong in each."),
}


class Refusal(click.ClickException):
    """What the user gave is wrong: printed as `fahooks: <message>`, exit code 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        """Print the message on stderr."""
        click.echo(f"fahooks: {self.message}", file=file, err=True)


class Fault(click.ClickException):
    """A run could not go on, through no fault of the user's input: printed as `fahooks: <message>`, exit code 1."""

    show = Refusal.show


class LazyGroup(click.Group):
    """A group that imports the module of a command when the command is asked for."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run as a program, whatever becomes of those who read what it prints."""
        with readers_may_leave():
            try:
                return super().main(*args, **options)
            except Failed as error:  # of `--help`, which no command has yet been invoked for
                click.echo(f"fahooks: {error}", err=True)
                sys.exit(1)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All command names, sorted."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command `cmd_name`; None where there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module, _ = COMMANDS[cmd_name]
        return getattr(importlib.import_module(module), "evaluate" if cmd_name == "eval" else cmd_name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that `args` begin with.

        Raises:
            InputError: there is none of that name.
        """
        if args[0] not in COMMANDS and not ctx.resilient_parsing:
            raise InputError(f"no command is named {args[0]!r}{near(args[0], COMMANDS)}; `fahooks --help` lists all")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands and their one-line summaries without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an `InputError` ends it with one line and exit code 2, a run that `Failed` with 1, Ctrl-C with 130."""
        with warnings.catch_warnings():
            _print_own_warnings()
            try:
                return super().invoke(ctx)
            except click.exceptions.NoArgsIsHelpError:
                raise
            except click.UsageError as error:
                command = error.ctx.command_path if error.ctx else f"{ctx.command_path} {ctx.invoked_subcommand or ''}".rstrip()
                raise Refusal(f"{_worded(error)}; `{command} --help` lists what it takes") from error
            except InputError as error:
                raise Refusal(str(error)) from error
            except Failed as error:
                raise Fault(str(error)) from error
            except KeyboardInterrupt:  # while modules are imported, say: a run that is under way says more itself
                click.echo("fahooks: stopped", err=True)
                sys.exit(130)


def _worded(error: click.UsageError) -> str:
    if isinstance(error, click.NoSuchOption):
        return f"there is no option {error.option_name}{near(error.option_name, error.possibilities or ())}".rstrip("?")
    return error.format_message().rstrip(".")


def _print_own_warnings() -> None:
    """Print fahooks' own warnings as one line, without the source line that Python's own format adds."""
    show_others = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if category.__module__.partition(".")[0] == "fahooks":
            click.echo(f"fahooks: warning: {message}", err=True)
        else:
            show_others(message, category, *args, **kwargs)

    warnings.showwarning = show


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fahooks", prog_name="fahooks", message="%(prog)s %(version)s")
def main() -> None:
    """Feedback alignment for any PyTorch or timm model."""
