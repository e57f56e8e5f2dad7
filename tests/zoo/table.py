"""What was found: a CSV file with a line a model, and a page with a line a family."""

from __future__ import annotations

import csv
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.zoo.names import all_names

Row = dict[str, Any]

COLUMNS = ["name", "family", "result", "weights", "side", "size", "parameters", "seconds", "peak_gib", "reason"]

RESULTS = ("pass", "fail", "skipped")


def read(results: Path) -> dict[str, Row]:
    """The last result of every model, by name."""
    if not results.is_file():
        return {}
    with results.open(newline="", encoding="utf-8") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def append(results: Path, row: Row) -> None:
    """Add a result to the file."""
    begun = results.is_file()
    with results.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if not begun:
            writer.writeheader()
        writer.writerow(row)


def write(page: Path, results: Path) -> None:
    """Write the page, and the file of results anew: sorted, each model once."""
    rows = sorted(read(results).values(), key=lambda row: row["name"])
    results.unlink(missing_ok=True)
    for row in rows:
        append(results, row)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "timm"))
    counts = ", ".join(f"{sum(row['result'] == result for row in rows)} {result}" for result in RESULTS)
    missing = len(set(all_names()) - {row["name"] for row in rows})
    left = f" {missing} are still to be checked." if missing else ""
    lines = [
        PREFACE.format(total=len(rows), counts=counts, versions=versions, left=left),
        "| family | models | pass | fail | skipped |",
        "|---|--:|--:|--:|--:|",
        *_families(rows),
        "",
        "## What did not pass",
        "",
        *(_reasons(rows) or ["Nothing."]),
    ]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


PREFACE = """# The zoo

The models that `timm.list_models()` names, and the classification models of torchvision: {total} of them, {counts},
with {versions}.{left}

```sh
python -m tests.zoo --all --workers 2 --table docs/zoo.md
python -m tests.zoo --match 'torchvision/vgg*' --again --memory 16 --table docs/zoo.md
```

A model passes if, converted by `fa` and by `usf_sn`, in float64 with random weights: its outputs have the same bits as before, in
training and in evaluation; `fahooks.audit` finds no linear map that is not routed; every gradient is that of the oracle
(`fahooks.reference`, no custom backward), and the same parameters have one as under backpropagation; and as a control, the
gradient of the images is another one than backpropagation's. Repeated blocks are taken out where a model has many, and images
are as small as the model takes: [zoo.csv](zoo.csv) has the sizes, seconds and memory of each.

torchvision's models of segmentation and detection, and models of transformers, are checked in the same way by tests:

```sh
pytest tests/zoo            # those that are quick, and the models of transformers
pytest -m slow tests/zoo    # the others of torchvision, a minute each, keypointrcnn_resnet50_fpn nine
```
"""


def _families(rows: list[Row]) -> list[str]:
    counts: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(RESULTS, 0))
    for row in rows:
        counts[row["family"]][row["result"]] += 1
    return [
        f"| {name} | {sum(found.values())} | {' | '.join(str(found[result]) for result in RESULTS)} |"
        for name, found in sorted(counts.items())
    ]


def _reasons(rows: list[Row]) -> list[str]:
    """A line for every reason, with the models that have it in common."""
    by_reason: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        if row["result"] != "pass":
            by_reason[row["result"], row["reason"]].append(row["name"])
    return [f"- {result}: {', '.join(names)}: {reason}" for (result, reason), names in by_reason.items()]
