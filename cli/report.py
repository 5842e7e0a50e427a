"""`sest report`: what became of a run, as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sest.cli import console
from sest.cli.help import help_page
from sest.cli.options import Force, options
from sest.cli.progress import ConsoleProgress
from sest.cli.train import show_findings
from sest.config import ReportConfig

if TYPE_CHECKING:
    from sest.report.write import Report


@help_page("sest report run", "sest report first second third --out compared.html")
@options(ReportConfig)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folder; several are compared")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="output: the .html file; default: report.html in the run folder, of several runs in the working "
            "folder",
        ),
    ] = None,
    force: Force = False,
    **options: Any,
) -> None:
    """Write a run's report: scores beside every baseline, held-out perturbations, diagnosis, curves.

    One HTML file that opens in any browser, without a network. Several runs are compared side by side.
    """
    config = ReportConfig.from_values(options, "the command line")
    from sest.report.write import write_report

    with ConsoleProgress():
        written = write_report(
            runs,
            out,
            with_model=config.model,
            n_sets=config.sets,
            device=config.device,
            cache=config.cache,
            perturbations=config.perturbations,
            evaluation=config.evaluation,
            umap=config.umap,
            force=force,
        )
    show_report(written)


def show_report(written: Report) -> None:
    """Say what was written, what was left out, and what the curves say."""
    for note in written.notes:
        console.say(f"Left out: {note}")
    for name, findings in written.findings.items():
        show_findings(f"Diagnosis of {name}", findings)
    console.say(f"Written: {written.path} ({written.n_bytes / 1e6:.1f} MB)")
