"""`sest info`: what a path is, and whether it is sound."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from sest.cells.labels import PERTURBATION
from sest.cli import console
from sest.cli.help import help_page
from sest.cli.options import options
from sest.cli.train import show_splits, show_validation
from sest.config import EmbedConfig
from sest.errors import InputError
from sest.options import SPLITS

MOST_LABELS = 20  # perturbations shown; --json has all


@help_page("sest info cells.h5ad --pert-col guide", "sest info cache.zarr --splits splits.toml")
@options(EmbedConfig, {"Of a file of cells": "layer modality pert_col cell_type_col batch_col gene_col control labels"})
def info(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="cache, run, checkpoint, encoder folder, file of cells, splits TOML or file of perturbation features",
        ),
    ],
    json: Annotated[bool, typer.Option("--json", help="print JSON, for other programs [default: off]")] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="read every file and compare its sha256 (caches, runs, checkpoints, predictions) [default: off]",
        ),
    ] = False,
    splits: Annotated[
        Path | None, typer.Option(help=f"{SPLITS}: also show how it divides the cells of a cache; default: none")
    ] = None,
    **given: Any,
) -> None:
    """Say what a path is, and whether it is sound.

    A cache, a run, a checkpoint, an encoder folder, a file of cells, a splits TOML (checked against its files, before
    they are embedded) or a file of perturbation features.
    """
    from sest.describe import describe

    reading = EmbedConfig.from_values(given, "the command line")
    facts, damaged = describe(path, verify=verify, splits=splits, columns=reading)
    if json:
        console.say_json(facts)
    else:
        show_facts(path, facts)
    if damaged:
        raise InputError(
            f"{path} is damaged: {len(damaged)} files differ from their sha256, the first is {damaged[0]}."
        )


def show_facts(path: Path, facts: dict[str, Any]) -> None:
    """What a path is, as tables."""
    groups, metrics = facts.pop("groups", None), facts.pop("metrics", None)
    decisions = facts.pop("labels", None)
    table, notes = facts.pop("splits", None), facts.pop("split_notes", ())
    console.table(str(path), ["what", "value"], [[k.replace("_", " "), _text(v)] for k, v in facts.items()])
    if decisions:
        _show_labels(decisions)
    if groups:
        names = list(next(iter(groups.values())))
        rows = [[name, *(_text(group[n]) for n in names)] for name, group in groups.items()]
        console.table("groups", ["group", *(n.removeprefix("n_") for n in names)], rows)
    if table is not None:
        show_splits([list(row.values()) for row in table])
        for note in notes:
            console.say(note)
    if metrics:
        metrics = {name: math.nan if value is None else value for name, value in metrics.items()}
        show_validation(f"validation at step {metrics['step']:,}", metrics)


def _show_labels(decisions: list[dict[str, Any]]) -> None:
    """What labels are taken for: those that are not their own names, then the perturbations with most cells."""
    decided = [row for row in decisions if row["kind"] != PERTURBATION or row["why"]]
    plain = [row for row in decisions if row not in decided]
    rows = [*decided[:MOST_LABELS], *plain[: max(MOST_LABELS - len(decided), 3)]]
    columns = ["label", "cells", "is taken for", "why"]
    said = [[repr(row["label"]), _text(row["n_cells"]), _taken_for(row), row["why"] or "-"] for row in rows]
    console.table("labels", columns, said)
    if len(rows) < len(decisions):
        console.say(f"{len(decisions) - len(rows):,} more labels; --json has all.")


def _dose(treatment: dict[str, Any]) -> str:
    time = "" if treatment["hours"] is None else f" for {treatment['hours']:g} h"
    return f"{treatment['drug']} at {treatment['dose']:g} {treatment['unit']}{time}"


def _taken_for(row: dict[str, Any]) -> str:
    if row["kind"] == PERTURBATION:
        drugs = " and ".join(map(_dose, row["treatments"]))
        return drugs or ("itself" if row["name"] == row["label"] else row["name"])
    return "nothing: left out" if row["name"] is None else "the control"


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
