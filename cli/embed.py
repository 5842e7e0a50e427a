"""`sest embed`: phase one, cells to a store of embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from sest.cli import console
from sest.cli.options import given, opt
from sest.config import EmbedConfig

Text = Optional[str]  # noqa: UP045 - Typer shows Optional types as plain ones


def embed(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="INPUT...", help=".h5ad/.h5 files, or one cell-load style .toml")
    ],
    cache: Annotated[Path, typer.Option("--cache", "-o", help="store to write, or to continue (a folder, OUT.zarr)")],
    encoder: Annotated[str, opt(EmbedConfig, "encoder")],
    checkpoint: Annotated[Text, opt(EmbedConfig, "checkpoint")] = None,
    dim: Annotated[Text, opt(EmbedConfig, "dim")] = None,
    dtype: Annotated[Text, opt(EmbedConfig, "dtype")] = None,
    cells: Annotated[Text, opt(EmbedConfig, "cells")] = None,
    counts: Annotated[Text, opt(EmbedConfig, "counts")] = None,
    layer: Annotated[Text, opt(EmbedConfig, "layer")] = None,
    pert_col: Annotated[Text, opt(EmbedConfig, "pert_col")] = None,
    cell_type_col: Annotated[Text, opt(EmbedConfig, "cell_type_col")] = None,
    batch_col: Annotated[Text, opt(EmbedConfig, "batch_col")] = None,
    control: Annotated[Text, opt(EmbedConfig, "control")] = None,
    batch_size: Annotated[Optional[int], opt(EmbedConfig, "batch_size")] = None,  # noqa: UP045
    device: Annotated[Text, opt(EmbedConfig, "device")] = None,
    precision: Annotated[Text, opt(EmbedConfig, "precision")] = None,
    seed: Annotated[Optional[int], opt(EmbedConfig, "seed")] = None,  # noqa: UP045
    data_root: Annotated[
        list[Path],
        typer.Option(
            help="folder a .toml's paths may lead to, may be repeated; default: its own and the working folder"
        ),
    ] = [],  # noqa: B006 - Typer copies it
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, write nothing")] = False,
) -> None:
    """Run the frozen encoder once and store every cell's embedding.

    Running the same command again continues where it stopped.
    """
    options = given({name: value for name, value in locals().items() if name in EmbedConfig.names()})
    config = EmbedConfig.from_values(options, "the command line")
    from sest.embed import embed as run  # imports torch

    with console.ConsoleProgress() as progress:
        plan = run(inputs, cache, config, progress, data_roots=data_root, dry_run=dry_run)
    total = sum(c.file.n_cells for c in plan.cells)
    if dry_run:
        console.say(
            f"Would embed {plan.n_selected:,} of {total:,} cells at width {plan.dim} into {cache} "
            f"(at most {plan.n_bytes / 1e9:.2f} GB). Nothing was written."
        )
        return
    console.say(f"{cache}: {plan.n_selected:,} of {total:,} cells embedded at width {plan.dim}, complete.")
    if plan.attributes["licence"]:
        console.say(plan.attributes["licence"])
