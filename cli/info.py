"""`sest info`: what a path is, and whether it is sound."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from sest.cli import console
from sest.cli.train import show_splits, validation_rows
from sest.config import SPLITS
from sest.errors import InputError


def info(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="cache, run folder, checkpoint folder, encoder folder or .h5ad file")
    ],
    json: Annotated[bool, typer.Option("--json", help="print JSON, for other programs [default: off]")] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="read every file and compare its sha256 (caches, runs, checkpoints) [default: off]"
        ),
    ] = False,
    splits: Annotated[
        Path | None, typer.Option(help=f"{SPLITS}: also show how it divides the cells of a cache; default: none")
    ] = None,
) -> None:
    """Say what a path is, and whether it is sound.

    A cache, a run, a checkpoint, an encoder folder or a file of cells.
    """
    from sest.describe import describe

    facts, damaged = describe(path, verify=verify, splits=splits)
    if json:
        console.say_json(facts)
    else:
        groups, metrics = facts.pop("groups", None), facts.pop("metrics", None)
        table, notes = facts.pop("splits", None), facts.pop("split_notes", ())
        console.table(str(path), ["what", "value"], [[k.replace("_", " "), _text(v)] for k, v in facts.items()])
        if groups:
            names = list(next(iter(groups.values())))
            rows = [[name, *(_text(group[n]) for n in names)] for name, group in groups.items()]
            console.table("groups", ["group", *(n.removeprefix("n_") for n in names)], rows)
        if table is not None:
            show_splits([list(row.values()) for row in table])
            for note in notes:
                console.say(note)
        if metrics:
            columns = ["metric", "model", "perturbation mean", "controls"]
            metrics = {name: math.nan if value is None else value for name, value in metrics.items()}
            console.table(f"validation at step {metrics['step']:,}", columns, validation_rows(metrics))
    if damaged:
        raise InputError(
            f"{path} is damaged: {len(damaged)} files differ from their sha256, the first is {damaged[0]}."
        )


def _text(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)
