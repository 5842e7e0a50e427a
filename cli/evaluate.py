"""`sest evaluate`: predicted cells against real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from sest.cli import console

Text = Optional[str]  # noqa: UP045 - Typer shows Optional types as plain ones
Real = Optional[float]  # noqa: UP045


def evaluate(
    predicted: Annotated[Path, typer.Argument(metavar="PRED", help=".h5ad of `sest predict`, or any log1p prediction")],
    real: Annotated[Path, typer.Argument(metavar="REAL", help=".h5ad with the real cells, counts or log1p")],
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for results.csv and summary.json; new or empty")],
    pert_col: Annotated[Text, typer.Option(help="obs column with the perturbation; default: detected")] = None,
    cell_type_col: Annotated[Text, typer.Option(help="obs column with the cell type; default: detected")] = None,
    control: Annotated[Text, typer.Option(help="label of control cells; default: detected")] = None,
    layer: Annotated[Text, typer.Option(help="layer of REAL to read; default: X")] = None,
    counts: Annotated[str, typer.Option(help="what REAL holds (auto | raw | log1p)")] = "auto",
    target_sum: Annotated[Real, typer.Option(help="counts a cell before log1p; default: the prediction's")] = None,
    cell_eval: Annotated[bool, typer.Option(help="also run cell-eval, where it is installed")] = True,
    threads: Annotated[int, typer.Option(min=1, help="threads of cell-eval's differential expression")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="of the control cells that stand for baselines in cell-eval")] = 0,
) -> None:
    """Score predicted cells against real ones, beside baselines.

    Metrics: pearson_delta, mae and pds on pseudobulks; with the extra `eval` also cell-eval's.
    """
    from sest.evaluate import check_output, write_results
    from sest.evaluate import evaluate as score

    check_output(out)
    with console.ConsoleProgress() as progress:
        evaluation = score(
            predicted,
            real,
            pert_col=pert_col,
            cell_type_col=cell_type_col,
            control=control,
            layer=layer,
            counts=counts,
            target_sum=target_sum,
            with_cell_eval=cell_eval,
            threads=threads,
            seed=seed,
            progress=progress,
        )
    write_results(evaluation, out)
    for note in evaluation.notes:
        console.say(note)
    show_summary(evaluation.summary, f"{predicted.name} against {real.name}")
    console.say(f"Written: {out / 'results.csv'}, {out / 'summary.json'}")


def show_summary(summary: dict[str, dict[str, float]], title: str) -> None:
    """A table of metrics, the model beside the baselines."""
    predictors = list(dict.fromkeys(name for scores in summary.values() for name in scores))
    columns = ["metric", *(name.replace("_", " ") for name in predictors)]
    rows = [
        [metric, *(f"{scores[name]:.4f}" if name in scores else "-" for name in predictors)]
        for metric, scores in summary.items()
    ]
    console.table(title, columns, rows)
