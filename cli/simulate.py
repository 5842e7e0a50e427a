"""`sest simulate`: a Perturb-seq file of any size, for trying things and for benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from sest.cli import console
from sest.errors import InputError

File = Optional[Path]  # noqa: UP045 - Typer shows Optional types as plain ones


def simulate(
    out: Annotated[Path, typer.Argument(metavar="OUT.h5ad", help="file of raw counts to write")],
    features: Annotated[
        File, typer.Option(help="also write perturbation features (.npz, .safetensors, .pt); default: none")
    ] = None,
    splits: Annotated[
        File, typer.Option(help="also write a splits TOML that holds some perturbations out; default: none")
    ] = None,
    n_perturbations: Annotated[int, typer.Option(min=1, help="perturbed genes")] = 40,
    n_cells: Annotated[int, typer.Option(min=1, help="cells a perturbation and cell type")] = 100,
    n_controls: Annotated[int, typer.Option(min=1, help="control cells a cell type")] = 400,
    n_genes: Annotated[int, typer.Option(min=50, help="genes of the panel")] = 2000,
    genes: Annotated[File, typer.Option(help="file with one gene name a line; default: made-up names")] = None,
    expressed_genes: Annotated[int, typer.Option(min=1, help="mean number of genes with counts in a cell")] = 700,
    umi_per_cell: Annotated[int, typer.Option(min=1, help="median counts a cell")] = 5000,
    n_features: Annotated[int, typer.Option(min=1, help="width of a perturbation's features")] = 64,
    cell_types: Annotated[str, typer.Option(help="names of the cell types, separated by commas")] = "alpha,beta",
    seed: Annotated[int, typer.Option(min=0, help="everything follows from it")] = 0,
) -> None:
    """Simulate a Perturb-seq experiment of any size.

    Raw counts with controls, cell types, batches, and effects that generalise.
    A full panel: --n-genes 18080 --expressed-genes 3700 --umi-per-cell 15000.
    """
    from sest.simulate import Simulation, write_screen

    names = None
    if genes is not None:
        try:
            names = [line.strip() for line in genes.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"Cannot read {genes}: {error}.") from error
    simulation = Simulation(
        n_cells_per_perturbation=n_cells,
        n_controls=n_controls,
        n_perturbations=n_perturbations,
        n_genes=len(names) if names else n_genes,
        cell_types=tuple(name.strip() for name in cell_types.split(",")),
        n_features=n_features,
        expressed_genes=expressed_genes,
        umi_per_cell=umi_per_cell,
        seed=seed,
    )
    with console.ConsoleProgress() as progress:
        progress.begin("Simulating", simulation.n_cells, "cells")
        write_screen(simulation, out, features, splits, gene_names=names, on_rows=progress.advance)
    console.say(f"{out}: {simulation.n_cells:,} cells x {simulation.n_genes:,} genes, {n_perturbations} perturbations.")
