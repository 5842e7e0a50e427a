"""`sest report`: what became of a run, as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from sest.cli import console
from sest.cli.train import show_findings

Text = Optional[str]  # noqa: UP045 - Typer shows Optional types as plain ones
File = Optional[Path]  # noqa: UP045


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folder; several are compared")],
    out: Annotated[
        File,
        typer.Option(
            "--out",
            "-o",
            help="the .html file to write; default: report.html in the run folder, of several runs in the working "
            "folder",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        bool, typer.Option(help="predict the held-out cells and map the embeddings, which needs the store")
    ] = True,
    sets: Annotated[
        int,
        typer.Option(
            min=0,
            help="sets of each split to predict at most, one of each cell type and perturbation at "
            "least; 0: every cell",
        ),
    ] = 512,
    cache: Annotated[
        Text, typer.Option(help="where the store is; default: where the run says", show_default=False)
    ] = None,
    perturbations: Annotated[
        Text, typer.Option(help="where the features file is; default: where the run says", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
) -> None:
    """Write a run's report: curves, diagnosis, held-out perturbations, a map of the embeddings.

    One HTML file that opens in any browser, without a network. Several runs are compared side by side.
    """
    from sest.report import write_report

    with console.ConsoleProgress() as progress:
        written = write_report(
            runs,
            out,
            progress,
            with_model=model,
            n_sets=sets,
            device=device,
            cache=cache,
            perturbations=perturbations,
        )
    for note in written.notes:
        console.say(f"Left out: {note}")
    for name, findings in written.findings.items():
        show_findings(f"Diagnosis of {name}", findings)
    console.say(f"Written: {written.path} ({written.n_bytes / 1e6:.1f} MB)")
