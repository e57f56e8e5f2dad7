"""`fahooks convert`: convert a model, verify it, and write it to a file."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fahooks import plugins
from fahooks.plugins import InputError, one_line
from fahooks.terminal import on_terminal

from .refusing import refused
from .stopping import importing

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fahooks.surgery import Report
    from fahooks.verify import Verification

BATCH = 2
"""The fewest examples that batch normalisation learns from where it sees one pixel of each."""

EPILOG = """\b
Load the written file into a model that was built and converted in the same way: with the same model options, rule, rule
options, include, exclude and seed, all of which the file's metadata says.
After `fahooks convert paper/mnist --rule usf_sn -o out.safetensors`:
  import fahooks, fahooks.models, safetensors.torch
  model = fahooks.models.build("paper/mnist")
  fahooks.convert(model, "usf_sn", seed=0)
  safetensors.torch.load_model(model, "out.safetensors")
"""


@click.command(epilog=EPILOG)
@click.argument("model")
@click.option(
    "--rule",
    "rules",
    multiple=True,
    default=["fa"],
    show_default=True,
    metavar="[PATTERN=]RULE",
    help="A rule (`fahooks ls rules`), for the layers that PATTERN selects. Of several, the first that matches decides.",
)
@click.option("--include", multiple=True, metavar="PATTERN", help="Convert only what this selects; may be repeated.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave out what this selects; may be repeated.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="An option of the rule, such as gain=0.5.")
@click.option(
    "--model-option", "model_options", multiple=True, metavar="KEY=VALUE", help="An option of the model, such as num_classes=10."
)
@click.option("--seed", default=0, show_default=True, help="Seed of the weights, the feedback matrices and the example inputs.")
@click.option(
    "--input-size",
    metavar="C,H,W",
    help="Shape of one example to verify with.  [default: model.example_inputs or the model's own size]",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the converted model here, as safetensors.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
def convert(
    model: str,
    rules: Sequence[str],
    include: Sequence[str],
    exclude: Sequence[str],
    options: Sequence[str],
    model_options: Sequence[str],
    seed: int,
    input_size: str | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Convert MODEL, with random weights, to feedback alignment and verify it.

    MODEL is timm/NAME, torchvision/NAME, a registered name such as paper/mnist, or path/to/file.py:factory. A PATTERN is a glob
    over layer names, which also selects everything below a module of that name, or a regular expression after `re:`.

    Three things are verified: the forward pass gives the same bits as before; in every converted layer another feedback matrix
    sends another gradient below; every linear map of the model goes through a rule, save those left out as asked.
    Exit code 0 if all three hold, 1 if one does not, 2 if something that was given is wrong.
    """
    with importing():  # by the rules
        settings = {
            "model": model,
            "model_options": _key_values("--model-option", model_options),
            "rule": _rules(rules),
            "options": _key_values("--option", options),
            "include": list(include),
            "exclude": list(exclude),
            "seed": seed,
            "fahooks": version("fahooks"),
        }
        arguments = _arguments(settings)
    shape = None if input_size is None else _shape(input_size)
    with _destination(output) as partial:
        # What the user's own factory prints is not part of the document.
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            net, report, verification = _convert(settings, arguments, shape, show=not as_json)
        written = None
        if output is not None and partial is not None and verification.ok:
            _write(net, partial, output, settings)
            written = str(output)
    if as_json:
        click.echo(json.dumps(_document(settings, report, verification, written), indent=2))
    else:
        click.echo(f"\n{verification}")
        if output is not None:
            click.echo(f"wrote {written}" if written else f"{output} is not written: the verification failed")
    sys.exit(_exit_code(verification))


def _arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """What the settings mean as arguments of `fahooks.convert`; the rule and its options are checked before any work."""
    rule, options = settings["rule"], settings["options"]
    if isinstance(rule, str):
        with refused(f"rule {rule!r} can not be made with {options}"):
            plugins.rules.get(rule).build(**options)
        chosen: dict[Any, Any] = {"rule": rule, **options}
    elif options:
        raise InputError(
            "--option needs one --rule for all layers: it does not say which of the rules by PATTERN it is for; a recipe does, "
            "and fahooks.convert(model, {pattern: {'rule': name, option: value}})"
        )
    else:
        chosen = rule
    return {
        "rule": chosen,
        "include": settings["include"] or None,
        "exclude": settings["exclude"] or None,
        "seed": settings["seed"],
    }


def _convert(
    settings: dict[str, Any], arguments: dict[str, Any], shape: tuple[int, ...] | None, *, show: bool
) -> tuple[nn.Module, Report, Verification]:
    """Build, convert and verify the model; the layers are shown before the verification, which takes longest."""
    import torch

    import fahooks
    from fahooks import models, verify

    torch.manual_seed(settings["seed"])
    net = models.build(settings["model"], **settings["model_options"])
    inputs = _inputs(net, settings["model"], shape)
    shapes = ", ".join(str(tuple(getattr(value, "shape", ()))) for value in inputs)
    with refused(f"{settings['model']!r} does not run on an input of shape {shapes} (--input-size sets another)"):
        plain = verify.outputs(net, *inputs)
    report = fahooks.convert(net, **arguments)
    if show:
        _print(report)
    return net, report, verify.verify(net, plain, *inputs, ignore=report.left_out)


def _inputs(net: nn.Module, spec: str, shape: tuple[int, ...] | None) -> tuple[Tensor, ...]:
    """What to call the model with: the tensors that it offers itself as `example_inputs`, or a drawn batch."""
    import torch

    from fahooks import models

    offered = getattr(net, "example_inputs", None)
    if shape is None and offered is not None:
        return (offered,) if isinstance(offered, torch.Tensor) else tuple(offered)
    if shape is None:
        try:
            shape = models.input_size(net, spec)
        except InputError as error:
            raise InputError(f"{error}, or pass --input-size C,H,W") from error
    like = next((p for p in net.parameters() if p.is_floating_point()), torch.empty(0))
    return (torch.randn(BATCH, *shape, dtype=like.dtype, device=like.device),)


def _rules(texts: Sequence[str]) -> str | dict[str, str]:
    """One rule for all layers, or rules by pattern, in order."""
    rules: dict[str, str] = {}
    for text in texts:
        pattern, _, name = text.rpartition("=")
        plugins.rules.get(name)
        if pattern in rules:
            layers = f"for {pattern!r}" if pattern else "for all layers"
            raise InputError(f"--rule gives two rules {layers}: {rules[pattern]!r} and {name!r}")
        rules[pattern] = name
    if list(rules) == [""]:
        return rules[""]
    return {pattern or "*": name for pattern, name in rules.items()}


def _key_values(option: str, texts: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"{option} must be KEY=VALUE, such as {option} gain=0.5, got {text!r}")
        values[key] = _value(option, text, value)
    return values


def _value(option: str, text: str, value: str) -> Any:
    # YAML 1.1 takes 1e-4 for a word; it wants 1.0e-4.
    if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"{option} {text!r}: the value is no YAML: {one_line(error)}") from error


def _shape(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--input-size must be positive whole numbers, such as 3,224,224, got {text!r}")
    return tuple(map(int, parts))


@contextmanager
def _destination(output: Path | None) -> Iterator[Path | None]:
    """A file beside `output` to write first; that it can be written is known before the work, and it never stays behind."""
    if output is None:
        yield None
        return
    partial = output.with_name(f"{output.name}.partial")
    try:
        if output.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        partial.open("wb").close()
    except OSError as error:
        raise InputError(f"{str(output)!r} can not be written: {error.strerror}") from error
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _write(net: nn.Module, partial: Path, output: Path, settings: dict[str, Any]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_model

    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    try:
        # Unlike save_file, it knows of tensors that several names share.
        save_model(net, str(partial), metadata)
        os.replace(partial, output)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{str(output)!r} can not be written: {one_line(error)}") from error


def _document(settings: dict[str, Any], report: Report, verification: Verification, written: str | None) -> dict[str, Any]:
    return {
        **settings,
        "layers": [{**vars(layer), "converted": layer.reason is None} for layer in report.layers],
        "totals": {
            "layers": len(report.layers),
            "converted": len(report.converted),
            "skipped": len(report.skipped),
            "memory_bytes": report.memory_bytes,
        },
        "notes": report.notes,
        "verification": verification.as_dict(),
        "output": written,
        "exit_code": _exit_code(verification),
    }


def _print(report: Report) -> None:
    """A table that folds to the terminal's width; into a file or a pipe, whole lines."""
    if not on_terminal():
        click.echo(report)
        return
    console = Console()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in ("layer", "type", "weight", "rule", "bytes added", ""):
        table.add_column(column, overflow="fold", justify="right" if column == "bytes added" else "left")
    for layer in report.layers:
        outcome = Text(layer.outcome, "green" if layer.reason is None else "yellow")
        shape = "x".join(map(str, layer.weight_shape))
        cells = (layer.name or "(model)", layer.type, shape, layer.rule, f"{layer.memory_bytes:,}")
        table.add_row(*map(Text, cells), outcome)
    console.print(table)
    for line in (report.total, *report.notes):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _exit_code(verification: Verification) -> int:
    return 0 if verification.ok else 1
