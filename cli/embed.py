"""`sest embed`: phase one, cells to a cache of embeddings."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sest.cli import console
from sest.cli.help import help_page
from sest.cli.options import Force, opt, options
from sest.cli.progress import ConsoleProgress
from sest.config import EmbedConfig
from sest.errors import InputError
from sest.machine.ranks import device_of_rank, ranks_of
from sest.options import CACHE
from sest.outputs import check_output

if TYPE_CHECKING:
    from sest.embedding.plan import EmbedPlan

STATE_KEY = "X_state"  # where `state emb transform` puts its embeddings
GROUPS = {
    "What the cells are": (
        "cells counts layer modality mixed_scales pert_col cell_type_col batch_col control labels gene_col "
        "missing_genes"
    ),
    "The encoder and its embeddings": "weights max_tokens dim dtype seed",
    "Speed and memory": "batch_size precision device max_time",
}

CacheOption = Annotated[
    str | None,
    typer.Option(
        "--cache",
        "-o",
        help=f"{CACHE}: a folder (OUT.zarr) or a URL that fsspec knows (s3://...), new or to continue; default: "
        "none, with --to-h5ad",
    ),
]
Copy = Annotated[
    Path | None,
    typer.Option(
        help="also write a copy of INPUT with the embeddings in obsm; without --cache as `state emb transform`: "
        "CLS + 10 dataset columns in float32, and no cache is kept; default: none",
    ),
]
Like = Annotated[
    str | None,
    typer.Option(
        help="a cache, run or checkpoint: embed as its cells were, with the same encoder and projection, so that "
        "its heads can predict and go on learning (train --init-from); default: none"
    ),
]
DataRoots = Annotated[
    list[Path],
    typer.Option(help="folder a .toml's paths may lead to, may be repeated; default: its own and the working folder"),
]
Rank = Annotated[
    int | None,
    typer.Option(help="number of this process, from 0, of several that write one cache; default: torchrun's, or 0"),
]


@help_page(
    "sest embed cells.h5ad --encoder pca --cache cache.zarr",
    "sest embed screens/*.h5ad --encoder SE-600M --cache cache.zarr --device cuda",
    usual="encoder cache like dry_run cells counts pert_col cell_type_col batch_col control dim batch_size device "
    "max_time",
)
@options(EmbedConfig, GROUPS)
def embed(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT...",
            help="files of cells (.h5ad, .h5mu, .zarr), folders of them, URLs, or one cell-load style .toml",
        ),
    ],
    encoder: Annotated[str | None, opt(EmbedConfig, "encoder")] = None,
    cache: CacheOption = None,
    to_h5ad: Copy = None,
    obsm_key: Annotated[
        str, typer.Option(help=f"obsm entry for --to-h5ad [default: {STATE_KEY}]", show_default=False)
    ] = STATE_KEY,
    add: Annotated[
        bool,
        typer.Option("--add", help="add files to a cache; those it has are left as they are [default: off]"),
    ] = False,
    like: Like = None,
    data_root: DataRoots = [],  # noqa: B006 - Typer copies it
    rank: Rank = None,
    world_size: Annotated[
        int | None, typer.Option(help="number of processes that write one cache; default: torchrun's, or 1")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, write nothing [default: off]")] = False,
    force: Force = False,
    **options: Any,
) -> None:
    """Run the frozen encoder once and keep every cell's embedding.

    Running the same command again continues where it stopped.
    """
    config = EmbedConfig.from_values({"encoder": encoder or "", **options}, "the command line")
    config = dataclasses.replace(config, device=device_of_rank(config.device, os.environ))
    ranks = ranks_of(rank, world_size, os.environ)
    if cache is None and to_h5ad is None:
        raise InputError("Nowhere to write. Pass --cache OUT.zarr, or --to-h5ad OUT.h5ad.")
    from sest.api import made_by
    from sest.embedding.embed import embed as run  # imports torch
    from sest.embedding.write_obsm import check_key, write_obsm

    folder, is_kept = cache or "", cache is not None
    if to_h5ad is not None:
        _check_copied(inputs, config, ranks.world_size)
        check_output(to_h5ad, inputs=[*inputs, cache, encoder], force=force)
        check_key(inputs[0], obsm_key)
        if not is_kept:
            folder = str(to_h5ad.with_name(f".{to_h5ad.name}.sest.zarr"))  # so that a stopped run can be continued
            config = config if like is not None else _whole(config)
    with ConsoleProgress(f"[rank {ranks.rank}] " if ranks.world_size > 1 else ""):
        plan = run(
            inputs,
            folder,
            config,
            data_roots=data_root,
            ranks=ranks,
            add=add,
            like=made_by(like) if like is not None else None,
            targets=is_kept,
            dry_run=dry_run,
        )
        if to_h5ad is not None and not dry_run:
            from sest.cache import open_cache

            group = open_cache(folder).groups[plan.cells[0].group]
            write_obsm(inputs[0], group, to_h5ad, obsm_key, plan.dim)
            if not is_kept:
                shutil.rmtree(folder)
    show_embedded(plan, cache, to_h5ad, obsm_key, dry_run)


def _check_copied(inputs: list[Path], config: EmbedConfig, world_size: int) -> None:
    """Refuse what --to-h5ad cannot copy: it takes one .h5ad, whole, in one process."""
    if world_size > 1:
        raise InputError("--to-h5ad is for one process. Embed into --cache with several, then run this with one.")
    if len(inputs) != 1 or inputs[0].suffix == ".toml":
        raise InputError("--to-h5ad takes one .h5ad file as INPUT.")
    if config.modality is not None:
        raise InputError("--to-h5ad copies an .h5ad file, which has no --modality. Pass --cache.")


def _whole(config: EmbedConfig) -> EmbedConfig:
    """The same with all that the encoder gives, as `state emb transform` writes it, unless --dim says otherwise."""
    from sest.encoder.choose import needs_weights

    dim = config.dim or ("state" if needs_weights(config.encoder) else "native")
    return dataclasses.replace(config, dim=dim, dtype="float32")


def show_embedded(
    plan: EmbedPlan, cache: str | None, to_h5ad: Path | None = None, obsm_key: str = STATE_KEY, dry_run: bool = False
) -> None:
    """Say what was embedded, or would be."""
    total = sum(c.file.n_cells for c in plan.cells)
    embedded = f"{plan.n_selected:,} of {total:,} cells"
    if dry_run:
        console.say(
            f"Would embed {embedded} at width {plan.dim} into {cache or to_h5ad} "
            f"(at most {plan.n_bytes / 1e9:.2f} GB). Nothing was written."
        )
        return
    if cache is not None and plan.complete:
        console.say(f"{cache}: {embedded} embedded at width {plan.dim}, complete.")
    if to_h5ad is not None:
        console.say(
            f"{to_h5ad}: {plan.cells[0].source.path.name} with obsm[{obsm_key!r}], {total:,} cells x {plan.dim}."
        )
    if plan.complete and plan.attributes["licence"]:
        console.say(plan.attributes["licence"])
