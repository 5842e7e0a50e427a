"""`sest simulate`: a Perturb-seq file of any size, for trying things and for benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sest.cli import console
from sest.cli.help import help_page
from sest.cli.options import Force, options
from sest.cli.progress import ConsoleProgress
from sest.errors import InputError
from sest.options import FEATURES, GENES, SPLITS
from sest.simulation.simulation import Simulation

GROUPS = {
    "How many": "n_perturbations n_cells_per_perturbation n_controls n_features",
    "The cells": "cell_types n_genes expressed_genes umi_per_cell",
    "Repeating it": "seed",
}


@help_page(
    "sest simulate cells.h5ad --splits splits.toml --features features.npz",
    "sest simulate small.h5ad --n-perturbations 10 --n-cells 50 --cell-types a,b",
)
@options(Simulation, GROUPS, n_cells_per_perturbation={"flag": "--n-cells"})
def simulate(
    out: Annotated[Path, typer.Argument(metavar="OUT.h5ad", help="file of raw counts to write")],
    features: Annotated[
        Path | None,
        typer.Option(help=f"{FEATURES}: also write a file of them (.npz, .safetensors, .pt); default: none"),
    ] = None,
    splits: Annotated[
        Path | None,
        typer.Option(help=f"{SPLITS}: also write one that holds some perturbations out; default: none"),
    ] = None,
    genes: Annotated[
        Path | None, typer.Option(help=f"{GENES}: those of the panel, instead of --n-genes; default: made-up names")
    ] = None,
    force: Force = False,
    **options: Any,
) -> None:
    """Simulate a Perturb-seq experiment of any size.

    Raw counts with controls, cell types, batches, and effects that generalise.
    A full panel: --n-genes 18080.
    """
    names = None
    if genes is not None:
        try:
            names = [line.strip() for line in genes.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"Cannot read {genes}: {error}.") from error
    simulation = Simulation.from_values(options | ({"n_genes": len(names)} if names else {}), "the command line")
    from sest.simulation.screen import write_screen

    with ConsoleProgress():
        write_screen(simulation, out, features, splits, gene_names=names, inputs=[genes], force=force)
    n_cells, n_genes, n_perturbations = simulation.n_cells, simulation.n_genes, simulation.n_perturbations
    console.say(f"{out}: {n_cells:,} cells x {n_genes:,} genes, {n_perturbations} perturbations.")
