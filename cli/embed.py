"""`sest embed`: phase one, cells to a store of embeddings."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Annotated, Optional

import typer

from sest.cli import console
from sest.cli.options import given, opt
from sest.config import EmbedConfig
from sest.errors import InputError
from sest.ranks import device_of_rank, ranks_of

STATE_KEY = "X_state"  # where `state emb transform` puts its embeddings
Text = Optional[str]  # noqa: UP045 - Typer shows Optional types as plain ones


def embed(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="INPUT...", help=".h5ad/.h5 files, or one cell-load style .toml")
    ],
    encoder: Annotated[str, opt(EmbedConfig, "encoder")],
    cache: Annotated[
        Text,
        typer.Option(
            "--cache",
            "-o",
            help="store to write, or to continue: a folder (OUT.zarr), or a URL that fsspec knows (s3://...); "
            "default: none, with --to-h5ad",
        ),
    ] = None,
    to_h5ad: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--to-h5ad",
            help="also write a copy of INPUT with the embeddings in obsm; without --cache as `state emb transform`: "
            "CLS + 10 dataset columns in float32, and no store is kept; default: none",
        ),
    ] = None,
    obsm_key: Annotated[
        str, typer.Option("--obsm-key", help=f"obsm entry for --to-h5ad [default: {STATE_KEY}]", show_default=False)
    ] = STATE_KEY,
    add: Annotated[
        bool,
        typer.Option("--add", help="add files to a store; those it has are left as they are [default: off]"),
    ] = False,
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
    max_tokens: Annotated[Optional[int], opt(EmbedConfig, "max_tokens")] = None,  # noqa: UP045
    seed: Annotated[Optional[int], opt(EmbedConfig, "seed")] = None,  # noqa: UP045
    data_root: Annotated[
        list[Path],
        typer.Option(
            help="folder a .toml's paths may lead to, may be repeated; default: its own and the working folder"
        ),
    ] = [],  # noqa: B006 - Typer copies it
    rank: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="number of this process, from 0, of several that write one store; default: torchrun's, or 0"),
    ] = None,
    world_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="number of processes that write one store; default: torchrun's, or 1"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, write nothing")] = False,
) -> None:
    """Run the frozen encoder once and store every cell's embedding.

    Running the same command again continues where it stopped.
    """
    options = given({name: value for name, value in locals().items() if name in EmbedConfig.names()})
    config = EmbedConfig.from_values(options, "the command line")
    ranks = ranks_of(rank, world_size, os.environ)
    config = dataclasses.replace(config, device=device_of_rank(config.device, os.environ))
    if cache is None and to_h5ad is None:
        raise InputError("Nowhere to write. Pass --cache OUT.zarr, or --to-h5ad OUT.h5ad.")
    if to_h5ad is not None:
        if ranks.world_size > 1:
            raise InputError("--to-h5ad is for one process. Embed into --cache with several, then run this with one.")
        if len(inputs) != 1 or inputs[0].suffix == ".toml":
            raise InputError("--to-h5ad takes one .h5ad file as INPUT.")
    from sest.embed import embed as run  # imports torch
    from sest.write_obsm import check_output, write_obsm

    store, kept = cache or "", cache is not None
    if to_h5ad is not None:
        check_output(inputs[0], to_h5ad, obsm_key)
    if to_h5ad is not None and cache is None:
        store = str(to_h5ad.with_name(f".{to_h5ad.name}.sest.zarr"))  # so that a stopped run can be continued
        config = dataclasses.replace(config, dim=config.dim or ("native" if encoder == "pca" else "state"))
        config = dataclasses.replace(config, dtype="float32")
    prefix = f"[rank {ranks.rank}] " if ranks.world_size > 1 else ""
    with console.ConsoleProgress(prefix) as progress:
        plan = run(
            inputs, store, config, progress, data_roots=data_root, ranks=ranks, add=add, targets=kept, dry_run=dry_run
        )
        if to_h5ad is not None and not dry_run:
            from sest.cache import open_cache

            group = open_cache(store).groups[plan.cells[0].group]
            write_obsm(inputs[0], group, to_h5ad, obsm_key, plan.dim, progress)
            if not kept:
                shutil.rmtree(store)
    total = sum(c.file.n_cells for c in plan.cells)
    if dry_run:
        console.say(
            f"Would embed {plan.n_selected:,} of {total:,} cells at width {plan.dim} into "
            f"{cache or to_h5ad} (at most {plan.n_bytes / 1e9:.2f} GB). Nothing was written."
        )
        return
    if kept and plan.complete:
        console.say(f"{cache}: {plan.n_selected:,} of {total:,} cells embedded at width {plan.dim}, complete.")
    if to_h5ad is not None:
        console.say(f"{to_h5ad}: {inputs[0].name} with obsm[{obsm_key!r}], {total:,} cells x {plan.dim}.")
    if plan.complete and plan.attributes["licence"]:
        console.say(plan.attributes["licence"])
